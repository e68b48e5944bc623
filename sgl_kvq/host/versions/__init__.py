"""What differs between the SGLang versions that this package runs on, and nothing else.

`supported` is the table of versions, `records` the shapes of `ServerArgs`, `internals` private
attributes, `calls` the arguments we pass and are passed. Code outside of this folder does not ask
which version is installed; in here, differences are found by what SGLang has, not by its number.
"""
