"""A page that shows an answer as it is written, and for each token what the model sees of the image."""
