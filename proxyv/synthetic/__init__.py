"""The small world: rendered documents and charts with questions, in real schemas."""
