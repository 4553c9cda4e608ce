"""What holds for every kind of layer, said once."""
