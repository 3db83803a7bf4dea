"""What a person can choose, with types, ranges and defaults: model, data, training, parallel; names and recipes."""
