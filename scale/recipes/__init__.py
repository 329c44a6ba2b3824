"""How the models of `scale/assets`, and of your own pictures, are made."""
