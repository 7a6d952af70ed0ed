"""What a model costs: FLOPs, time and memory, of the baseline and of ProxyV side by side."""
