"""The paper's redundancy study, and methods side by side: scores, costs, failures."""
