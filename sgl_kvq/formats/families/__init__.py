"""The formats that come with this package. Importing a module here registers its formats."""
