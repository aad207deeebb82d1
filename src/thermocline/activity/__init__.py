"""Which neurons fire: statistics, predictors, and how good they are."""
