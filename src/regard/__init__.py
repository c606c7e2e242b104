"""regard: small vision models, native to transformers, that say where they look.

Importing it makes its models loadable by transformers' Auto classes and `pipeline`. Trainers, metrics and data sets
are imported from their own modules, because they are heavy and inference does without them.
"""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForVisualQuestionAnswering,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY, REMOVED_TASKS

from regard.configuration.configuration_image_text_slot import ImageTextSlotConfig
from regard.configuration.configuration_qavit import QAViTConfig
from regard.configuration.configuration_query_conditioned_vqa import QueryConditionedVQAConfig
from regard.configuration.configuration_sequential_attention_counting import SequentialAttentionCountingConfig
from regard.modeling.modeling_image_text_slot import ImageTextSlotModel
from regard.modeling.modeling_qavit import QAViTBackbone, QAViTForImageClassification, QAViTModel
from regard.modeling.modeling_query_conditioned_vqa import QueryConditionedVQAModel
from regard.modeling.modeling_sequential_attention_counting import SequentialAttentionCountingModel
from regard.pipelines.object_counting import ObjectCountingPipeline
from regard.pipelines.text_recognition import TextRecognitionPipeline
from regard.pipelines.visual_question_answering import VisualQuestionAnsweringPipeline
from regard.processing.image_processing_image_text_slot import ImageTextSlotImageProcessor
from regard.processing.image_processing_qavit import QAViTImageProcessor
from regard.processing.processing_image_text_slot import ImageTextSlotProcessor
from regard.processing.processing_query_conditioned_vqa import QueryConditionedVQAProcessor
from regard.processing.processing_sequential_attention_counting import SequentialAttentionCountingProcessor
from regard.processing.tokenization_byte import build_byte_tokenizer

__version__ = "0.1.0"

AutoConfig.register("image_text_slot", ImageTextSlotConfig)
AutoModel.register(ImageTextSlotConfig, ImageTextSlotModel)
AutoImageProcessor.register(ImageTextSlotConfig, image_processor_classes={"pil": ImageTextSlotImageProcessor})
AutoProcessor.register(ImageTextSlotConfig, ImageTextSlotProcessor)  # AutoTokenizer needs no class: tokenizer.json
PIPELINE_REGISTRY.register_pipeline("text-recognition", TextRecognitionPipeline, pt_model=AutoModel, type="image")

AutoConfig.register("qavit", QAViTConfig)
AutoModel.register(QAViTConfig, QAViTModel)
AutoModelForImageClassification.register(QAViTConfig, QAViTForImageClassification)
AutoBackbone.register(QAViTConfig, QAViTBackbone)
AutoImageProcessor.register(QAViTConfig, image_processor_classes={"pil": QAViTImageProcessor})

AutoConfig.register("query_conditioned_vqa", QueryConditionedVQAConfig)
AutoModel.register(QueryConditionedVQAConfig, QueryConditionedVQAModel)
AutoModelForVisualQuestionAnswering.register(QueryConditionedVQAConfig, QueryConditionedVQAModel)
AutoProcessor.register(QueryConditionedVQAConfig, QueryConditionedVQAProcessor)
PIPELINE_REGISTRY.register_pipeline(
    "visual-question-answering", VisualQuestionAnsweringPipeline, pt_model=AutoModel, type="multimodal"
)
REMOVED_TASKS.pop("visual-question-answering", None)  # or `pipeline` refuses the name, whoever has registered it

AutoConfig.register("sequential_attention_counting", SequentialAttentionCountingConfig)
AutoModel.register(SequentialAttentionCountingConfig, SequentialAttentionCountingModel)
AutoProcessor.register(SequentialAttentionCountingConfig, SequentialAttentionCountingProcessor)
PIPELINE_REGISTRY.register_pipeline("object-counting", ObjectCountingPipeline, pt_model=AutoModel, type="multimodal")


class _OwnCode:
    """What a checkpoint says of code that lies beside it: nothing, for regard's own classes load it."""

    def __get__(self, instance, owner=None) -> dict:
        return {}

    def __set__(self, instance, value):
        pass


for _class in (
    ImageTextSlotConfig,
    ImageTextSlotImageProcessor,
    QAViTConfig,
    QAViTImageProcessor,
    QueryConditionedVQAConfig,
    SequentialAttentionCountingConfig,
):
    for _name in ("auto_map", "custom_pipelines"):  # transformers keeps what it finds under any name as an attribute
        setattr(_class, _name, _OwnCode())

__all__ = [
    "ImageTextSlotConfig",
    "ImageTextSlotImageProcessor",
    "ImageTextSlotModel",
    "ImageTextSlotProcessor",
    "ObjectCountingPipeline",
    "QAViTBackbone",
    "QAViTConfig",
    "QAViTForImageClassification",
    "QAViTImageProcessor",
    "QAViTModel",
    "QueryConditionedVQAConfig",
    "QueryConditionedVQAModel",
    "QueryConditionedVQAProcessor",
    "SequentialAttentionCountingConfig",
    "SequentialAttentionCountingModel",
    "SequentialAttentionCountingProcessor",
    "TextRecognitionPipeline",
    "VisualQuestionAnsweringPipeline",
    "build_byte_tokenizer",
]
