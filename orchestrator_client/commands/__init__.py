"""The commands of users, a module for each group of them."""
