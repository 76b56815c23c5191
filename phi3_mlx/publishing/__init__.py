"""A directory as a repository of the Hugging Face hub: which files go there, the model card, the upload."""
