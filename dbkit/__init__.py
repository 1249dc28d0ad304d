"""dbkit teaches Stable Diffusion a subject or a style from a handful of pictures.

Five functions do the main job; caption_dataset() and check_identifier() help with its data, plan() says what a training
will need, evaluate() measures what came of it, merge() puts a LoRA into its model and extract_lora() takes one out,
status() tells how far a run is, watch() shows it as it goes on, and saved_models() what there is to export. Each takes
its settings object, or the settings by name. Heavy libraries are imported when a function is called.
"""

from dbkit.captioning import caption_dataset
from dbkit.class_images import generate_class_images
from dbkit.config import (
    CaptionConfig,
    ClassImagesConfig,
    ConvertConfig,
    EvaluateConfig,
    ExtractLoraConfig,
    IdentifierConfig,
    MergeConfig,
    PrepareConfig,
    PreviewConfig,
    StatusConfig,
    TrainConfig,
    WatchConfig,
)
from dbkit.convert import convert
from dbkit.dataset import prepare_dataset
from dbkit.errors import DbkitError
from dbkit.evaluate import evaluate
from dbkit.extract import extract_lora
from dbkit.identifier import check_identifier
from dbkit.lora import merge
from dbkit.machine import describe_machine
from dbkit.plan import Plan, plan
from dbkit.preview import preview
from dbkit.saved_models import SavedModels, saved_models
from dbkit.status import RunStatus, status
from dbkit.train import train
from dbkit.watch import watch
from dbkit.workspace import open_workspace

__version__ = "0.1.0"
__all__ = [
    "CaptionConfig",
    "ClassImagesConfig",
    "ConvertConfig",
    "DbkitError",
    "EvaluateConfig",
    "ExtractLoraConfig",
    "IdentifierConfig",
    "MergeConfig",
    "Plan",
    "PrepareConfig",
    "PreviewConfig",
    "RunStatus",
    "SavedModels",
    "StatusConfig",
    "TrainConfig",
    "WatchConfig",
    "caption_dataset",
    "check_identifier",
    "convert",
    "describe_machine",
    "evaluate",
    "extract_lora",
    "generate_class_images",
    "merge",
    "open_workspace",
    "plan",
    "prepare_dataset",
    "preview",
    "saved_models",
    "status",
    "train",
    "watch",
]
