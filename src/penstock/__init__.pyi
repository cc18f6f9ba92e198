from penstock.batch.llm import LLM as LLM
from penstock.batch.results import Result as Result
from penstock.errors import PenstockError as PenstockError

__version__: str
