"""Public evaluation protocols: prompts, answers and scores; no model in them."""
