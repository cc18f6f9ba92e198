"""Small talk: greetings, who the model is, and an honest answer to what it cannot know."""

import random

from penstock.demo.phrases import article
from penstock.demo.questions import HELD_OUT, TRAINING, Style, ask_task, ask_term, polish, wording

UNKNOWN = "I do not know that: I am a tiny demo model that knows Slurm, Penstock and little else."

TALK: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "Hello! I am the Penstock demo model. Ask me about Slurm or Penstock commands.",
        (
            "(hi|hello|hey|good morning|good evening|good day|hi there|hello there|greetings|hey there|hallo|howdy)",
            "(hi|hello|hey) (penstock|model|friend|everybody|computer|bot)",
            "(how are you|how do you do|how is it going|what's up|nice to meet you) [today|my friend]",
            "(hi|hello|hey), how are you [today|doing]",
        ),
    ),
    (
        "I am the Penstock demo model, a tiny language model for trying the software.",
        (
            "(who|what) are you",
            "(tell me|say) (who|what) you are",
            "what is your name",
            "what's your name",
            "what kind of (model|program|bot) (are you|is this)",
            "(which|what) model (are you|is this|am I talking to|do I talk to)",
            "(introduce yourself|describe yourself|tell me about yourself)",
            "are you (a human|a person|a robot|chatgpt|a language model|an ai|gpt|a real model|llama)",
            "who am I (talking to|chatting with)",
            "what is (this|the demo model|the penstock demo model)",
        ),
    ),
    (
        "I answer questions about Slurm and Penstock, continue simple stories and turn sentences into JSON.",
        (
            "what can (you|this model) do",
            "what are you (able to do|good at|good for|for)",
            "(how|with what) can you help [me]",
            "what do you know",
            "what (should|can) I ask you",
            "(tell me|show me) what you can do",
            "help",
            "can you help me",
            "what are your (skills|abilities|talents)",
        ),
    ),
    (
        "I was trained on text that a small generator wrote; the recipe is in the folder demo of Penstock.",
        (
            "(how|on what|with what) were you (trained|made|built)",
            "who (made|trained|built|created) you",
            "(what|which) data were you trained on",
            "where do you come from",
        ),
    ),
    (
        "I am tiny: about five million parameters.",
        (
            "how (big|large|small) are you",
            "how many parameters (do you have|does this model have)",
            "what is your size",
        ),
    ),
    (
        "You are welcome.",
        ("(thanks|thank you|thank you very much|many thanks|thx|great, thanks|perfect, thank you|thanks a lot)",),
    ),
    (
        "Goodbye!",
        ("(bye|goodbye|see you|good night|bye bye|see you later|have a nice day|farewell)",),
    ),
)

_THINGS = (
    "(photosynthesis|gravity|a black hole|the moon|the French Revolution|an apple pie|democracy|a volcano|chess)",
    "(football|the theory of relativity|a violin|the stock market|an atom|a comet|inflation|poetry|a haiku)",
    "(kubernetes|docker|a blockchain|a rainbow|the Eiffel tower|a tax|a passport|the opera|a sonnet|electricity)",
    "(DNA|a virus|an umbrella|the weather [today]|a bicycle|a quark|html|javascript|rust|java|excel|a printer)",
    "(bluetooth|love|time|the internet|water|history|a prime number|an integral|the president|a mammal|a verb)",
    "the (capital|population|history|king|flag|language|currency) of (France|Spain|Peru|Japan|Canada|Italy|Egypt)",
    "the (largest|smallest|oldest|fastest|highest|deepest) (ocean|planet|city|animal|mountain|lake|tree|car)",
    "the price of (gold|milk|a car|bread|a house|oil)",
    "the (distance to|age of|size of|mass of) the (sun|moon|earth|sea)",
    "a good (film|book|song|restaurant|joke|poem|present)",
    "the square root of (two|nine|16|81|144)",
    "(1|2|3|4|6|7|12|40|17) (plus|+|times|*|minus|-) (2|5|9|30|8|1|4)",
    "(qsub|bsub|qstat|kubectl|git|docker run|apt install|npm|vim|a mail server|PBS|LSF|condor|terraform|ansible)",
)
_TASKS = (
    "(bake|make|cook|eat) (a cake|bread|a pizza|soup|an apple pie|pancakes|rice|spaghetti|coffee|tea)",
    "(learn|speak|understand|teach) (French|Spanish|chess|the piano|Chinese|swimming|mathematics|latin)",
    "(grow|plant|water|cut) (tomatoes|a tree|roses|potatoes|my plants|grass)",
    "(fix|repair|clean|sell|buy|paint) (a bike|my car|a roof|the kitchen|a lamp|a house|a phone|shoes)",
    "(travel|fly|go|get) to (Paris|Rome|the moon|the station|London|the airport|Mars|the sea)",
    "(write|read|sing|translate) (a poem|a novel|a song|a letter|a haiku|this text)",
    "(sort a list|parse html|write a loop|read a file|print a string|reverse a string) in (python|java|c)",
    "(commit|push|merge|clone) (my changes|a branch|a repository) [with git]",
    "(lose weight|sleep better|tie a tie|change a tyre|win the lottery|become rich|stay young|find a friend)",
    "(draw|catch|feed|wash|train) (a cat|a horse|a fish|a dog|a dragon)",
    "(install|update|remove) (windows|linux|a printer|a game|word|an app)",
)
_QUESTIONS = (
    "who (wrote|painted|discovered|invented|won) (hamlet|the mona lisa|america|the telephone|the world cup|radium)",
    "when (did|was) (the war end|rome founded|napoleon born|the wall built|the telephone invented)",
    "where (is|lies) (paris|the nile|mount everest|my phone|the toilet|africa|the nearest shop)",
    "why is (the sky blue|grass green|the sea salty|ice slippery|the moon round)",
    "how (many|much) (legs has a spider|planets are there|does a whale weigh|people live in china|is a dollar)",
    "what (time|day|year) is it",
    "(do you like|have you seen|can you sing|can you draw) (music|me|a picture|cheese|films|the sea)",
    "will it rain (today|tomorrow|at night)",
    "(tell me a joke|write me a poem|sing a song|draw a picture|translate this to german|solve this equation)",
)
_SYLLABLES = "ba be bo da do fi fla ga gro ka ko la lo mi mu na no pa pli ra ro sa sni ta tu va wo zi zo"


def invented(rng: random.Random) -> str:
    """A word that means nothing."""
    return "".join(rng.choice(_SYLLABLES.split()) for _ in range(rng.randint(2, 4)))


def unknown(style: Style, rng: random.Random) -> tuple[str, str]:
    """A question that the model must not answer, with the honest reply."""
    kind = rng.random()
    if kind < 0.35:
        return ask_task(wording(_TASKS, style, rng), style, rng), UNKNOWN
    if kind < 0.7:
        return ask_term(wording(_THINGS, style, rng), style, rng), UNKNOWN
    if kind < 0.85:
        question = rng.choice(style.frames).format(q=wording(_QUESTIONS, style, rng))
        return polish(question, style, rng), UNKNOWN
    word = invented(rng)
    term = rng.choice((article(word), f"`{word}`", word, f"the command {word}", f"{word} --{invented(rng)}"))
    return ask_term(term, style, rng), UNKNOWN


def talk(style: Style, rng: random.Random) -> tuple[str, str]:
    """A greeting, or a question about the model itself, with its reply."""
    answer, patterns = rng.choice(TALK)
    text = wording(patterns, style, rng)
    return polish(text, TRAINING if style is HELD_OUT and rng.random() < 0.5 else style, rng), answer
