"""The embedded model's workshop: corpus, tokenizer, training and evaluation. See README.md beside this file."""
