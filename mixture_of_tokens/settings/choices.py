"""Legal values of settings that are one of a few words, and defaults that several functions share."""

from typing import Literal

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]  # of the weights of a model that is only read
Expected = Literal["causal", "private", "separate"]  # of an audit
Format = Literal["transformers", "gguf", "hub"]  # of an export
Quantize = Literal["f32", "f16", "q8_0", "q4_0"]  # types of a GGUF file's matrices
Scores = Literal["softmax", "sigmoid"]  # of a router; of Token Choice's gates in the order of `Routing.converts_to`
Schedule = Literal["continued", "decay", "own"]  # of the learning rate after a transition

TEMPERATURE = 0.8  # of sampling
