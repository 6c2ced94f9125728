"""From a batch to text."""
