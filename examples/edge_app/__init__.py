"""A small service that classifies digits, and trains its network in the background inside a budget."""
