"""What the paper takes as given, trained from nothing for the model `tiny`: one module a part, one loop for all."""
