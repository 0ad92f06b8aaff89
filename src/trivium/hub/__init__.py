"""The door to Hugging Face: importing this registers Trivium's models with transformers.

import trivium.hub
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("runs/.../model")
"""

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ImportError("trivium.hub needs transformers, which is not installed; pip install 'trivium[hf]' brings it")

from trivium.hub.hf import StateCache, TriviumConfig, TriviumForCausalLM

__all__ = ["StateCache", "TriviumConfig", "TriviumForCausalLM"]
