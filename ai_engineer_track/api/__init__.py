"""The service over HTTP: one file for each group of routes, put together in main.py."""
