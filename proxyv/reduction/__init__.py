"""Token reduction: methods that drop or merge vision tokens, behind one small interface."""
