"""The verified artifact: stores a run's models in a directory, proves them in a fresh process, and loads them."""
