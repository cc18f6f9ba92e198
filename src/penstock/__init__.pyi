from penstock.batch.farm.api import Farm as Farm
from penstock.batch.farm.api import farm as farm
from penstock.batch.llm import LLM as LLM
from penstock.batch.results import Result as Result
from penstock.errors import PenstockError as PenstockError

__version__: str
