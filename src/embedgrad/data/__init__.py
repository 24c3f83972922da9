"""Load rows from files or Hub data sets, check them, split them."""
