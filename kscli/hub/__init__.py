"""The Hugging Face Hub: how it is asked, and what is fetched from it: models and data sets."""
