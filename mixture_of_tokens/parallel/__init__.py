"""How a model lies over the processes that train it together."""
