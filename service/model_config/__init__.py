"""A model's YAML: its schema, the loader, and the list of the shipped ones.

Settings of a deployment (address, keys, logging) are in `settings.py`.
"""

from service.model_config.document import InvalidConfig, Mistake, Origins
from service.model_config.loader import catalogue, load, name_of
from service.model_config.schema import ModelConfig, Source
from service.model_config.shipped import listing
from service.model_config.spelling import nearest

__all__ = [
    "InvalidConfig",
    "Mistake",
    "ModelConfig",
    "Origins",
    "Source",
    "catalogue",
    "listing",
    "load",
    "name_of",
    "nearest",
]
