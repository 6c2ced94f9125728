"""Metrics from counts that add up, their confidence intervals, and the file that holds the results."""
