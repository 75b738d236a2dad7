"""What is final after tuning: weights as codes, biases as integers, batch-norm folded."""
