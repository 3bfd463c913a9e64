"""Several processes: what they tell each other, and parameters that are spread over them."""
