"""Files of Hugging Face directories, checked before anything relies on them."""
