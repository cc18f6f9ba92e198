"""Words of the sightings: animals, places, activities, and invented ones that teach the model to copy."""

import functools
import random
import re

from penstock.demo import story_words
from penstock.demo.facts import load_facts

ANIMALS = [
    word.strip()
    for word in """
puppy, kitten, cat, dog, raccoon, squirrel, fox, red fox, wolf, bear, black bear, polar bear, deer, moose,
elk, rabbit, hare, hedgehog, badger, beaver, otter, sea otter, weasel, ferret, skunk, opossum, porcupine,
chipmunk, mouse, rat, hamster, guinea pig, mole, bat, owl, barn owl, eagle, bald eagle, hawk, falcon,
kestrel, buzzard, vulture, crow, raven, magpie, jay, blue jay, robin, sparrow, finch, goldfinch, swallow,
swift, wren, thrush, blackbird, starling, woodpecker, kingfisher, heron, stork, crane, flamingo, pelican,
swan, goose, duck, duckling, gull, seagull, puffin, penguin, albatross, pigeon, dove, turkey, peacock,
pheasant, quail, chicken, hen, rooster, parrot, cockatoo, toucan, hummingbird, cuckoo, horse, pony, foal,
donkey, mule, zebra, cow, calf, bull, buffalo, bison, yak, sheep, lamb, ram, goat, kid goat, pig, piglet,
boar, camel, llama, alpaca, giraffe, elephant, rhino, hippo, lion, tiger, leopard, cheetah, jaguar, puma,
lynx, bobcat, hyena, jackal, coyote, monkey, baboon, gorilla, chimpanzee, orangutan, lemur, sloth, anteater,
armadillo, koala, kangaroo, wallaby, wombat, platypus, panda, red panda, seal, sea lion, walrus, dolphin,
whale, orca, shark, ray, salmon, trout, carp, eel, goldfish, octopus, squid, crab, lobster, starfish,
jellyfish, turtle, tortoise, lizard, gecko, iguana, chameleon, snake, viper, python, cobra, crocodile,
alligator, frog, tree frog, toad, newt, salamander, snail, slug, worm, spider, beetle, ladybug, butterfly,
moth, bee, bumblebee, wasp, ant, cricket, grasshopper, dragonfly, mosquito, caterpillar
""".replace("\n", " ").split(",")
]

# After the slash: the prepositions that go with the place; "in" where nothing is said.
PLACES = [
    word.strip()
    for word in """
park, city park, national park, forest, pine forest, woods, garden, botanical garden, rose garden, zoo/at,
meadow/in on, field/in on, valley, mountains, hills, desert, jungle, swamp, marsh, lake/at by near, river/at
by near, pond/at by near, creek/at by near, canal/at by near, beach/on at, shore/on by, coast/on near,
harbor/in at, island/on, bay, cave, canyon, gorge, orchard, vineyard, farm/on at, barn, stable, village,
town, city, street/in on, market/at in, square/in on, yard, backyard, front yard, schoolyard, playground/on
at, campground/at, cemetery, castle/at near, museum/at in, library/at in, station/at near, airport/at near,
train station/at near, bus stop/at, parking lot/in, shopping mall/in at, alley, bridge/on near, tunnel, golf
course/on, football field/on, stadium/in at, swimming pool/at near, gym/at in, hospital/at near, school/at
near, university/at near, campus/on, office/at in, kitchen, attic, basement, garage, cottage/at near,
cabin/at near, lodge/at near, hotel/at near, restaurant/at near, bakery/at near, wetlands, rainforest,
savanna/on in, prairie/on, steppe/on, tundra/on in, glacier/on near, waterfall/at near, spring/at near,
dunes, cliffs/on near, lighthouse/at near, pier/on at, dock/on at, marina/at in, nature reserve, wildlife
park, bird sanctuary, arboretum, greenhouse, cornfield, wheat field, rice field, olive grove, clearing,
quarry, riverbank/on, hillside/on, roadside/at, suburb, neighborhood, old town, courtyard, churchyard,
fairground/at on, circus/at, aquarium/at in, countryside
""".replace("\n", " ").split(",")
]

ACTIVITIES = [
    word.strip()
    for word in """
bike ride, walk, morning walk, evening walk, dog walk, hike, long hike, run, morning run, jog, stroll,
evening stroll, picnic, family picnic, boat trip, boat ride, canoe trip, kayak tour, fishing trip, camping
trip, school trip, field trip, road trip, day trip, weekend trip, train ride, bus ride, tram ride, car ride,
horse ride, pony ride, sleigh ride, balloon ride, ski tour, snowshoe walk, climbing tour, bird walk, photo
walk, photo safari, safari, guided tour, city tour, bike tour, treasure hunt, scavenger hunt, mushroom hunt,
egg hunt, barbecue, birthday party, garden party, lunch break, coffee break, vacation, summer vacation,
holiday, honeymoon, visit, family visit, walking tour, night walk, ghost tour, training run, marathon, half
marathon, race, bike race, treadmill break, yoga class, painting class, drawing lesson, riding lesson,
swimming lesson, research trip, survey, expedition, patrol, paper round, shopping trip, commute, errand,
cleanup, tree planting, harvest, excursion, outing, pilgrimage, orienteering run, geocaching tour, sailing
trip, cruise
""".replace("\n", " ").split(",")
]

DOINGS = [
    word.strip()
    for word in """
hiking, jogging, running, cycling, walking, swimming, fishing, camping, sailing, rowing, kayaking, canoeing,
climbing, skiing, snowboarding, sledding, skating, surfing, diving, snorkeling, riding, birdwatching, bird
watching, picnicking, gardening, painting, sketching, drawing, reading, strolling, wandering, geocaching,
orienteering, berry picking, mushroom picking, apple picking, stargazing, rock climbing, mountain biking,
trail running, horse riding, sightseeing, shopping, commuting, travelling, exploring, backpacking, paddling,
roller skating, playing tennis, playing football, playing chess, taking photos, flying a kite, walking the
dog, planting trees, collecting shells, feeding ducks
""".replace("\n", " ").split(",")
]

# Never in a record of the training: unseen words for measuring.
HELD_OUT = frozenset(
    word.strip()
    for word in """
hare, porcupine, kestrel, raven, blue jay, swallow, wren, blackbird, pelican, donkey, mule, buffalo, piglet, puma,
jackal, baboon, sloth, sea lion, trout, gecko, iguana, chameleon, viper, alligator, moth, bumblebee, jungle, swamp,
creek, cemetery, basement, cabin, lodge, prairie, steppe, dunes, nature reserve, rice field, courtyard, circus,
sleigh ride, ski tour, snowshoe walk, climbing tour, mushroom hunt, egg hunt, riding lesson, survey, patrol,
paper round, tree planting, pilgrimage, geocaching tour, berry picking, bird watching, drawing, commuting
""".replace("\n", " ").split(",")
)

PEOPLE = (
    "Anna|Ben|Clara|David|Emma|Felix|Grace|Hugo|Ida|Jonas|Kira|Leo|Maria|Noah|Olga|Paul|Rosa|Sami|Tina|Victor|"
    "Yara|Zoe|my sister|my brother|my mother|my father|my aunt|my uncle|my friend|my neighbor|my teacher|"
    "my grandmother|the guide|a tourist|the children|my parents|my kids|two friends|a farmer|the ranger|"
    "my daughter|my son|my wife|my husband"
)

_STARTS = "b bl br c ch cr d dr f fl fr g gl gr h j k kl kr l m n p pl pr qu r s sh sk sl sn sp st t th tr v w y z"
_MIDDLES = "a e i o u ai ea ee oo ou oa ie"
_ENDS = "|n|r|l|s|t|m|d|k|p|nd|nt|rk|sh|ck|x|lt|ng|st|ff|b|g"


@functools.cache
def _known_words() -> list[str]:
    """Words of the facts and stories, without those that are kept for evaluation."""
    text = " ".join(fact.answer for fact in load_facts())
    text += " ".join(value for name, value in vars(story_words).items() if name.isupper())
    return sorted({word for word in re.findall("[a-z]{3,}", text.lower()) if word not in HELD_OUT})


def invented_word(rng: random.Random) -> str:
    """A word to copy: of syllables, of pieces of two words, or a word that has no business there.

    The pieces bring every token of the vocabulary into copies, and not only those of the word lists.
    """
    kind = rng.random()
    if kind < 0.15:
        return rng.choice(_known_words())
    if kind < 0.6:
        head, tail = rng.choice(_known_words()), rng.choice(_known_words())
        return head[: rng.randint(2, len(head))] + tail[rng.randrange(len(tail) - 1) :]
    count = rng.choice((1, 2, 2, 2, 3))
    word = "".join(rng.choice(_STARTS.split()) + rng.choice(_MIDDLES.split()) for _ in range(count))
    return word + rng.choice(_ENDS.split("|"))


def pick(words: list[str], rng: random.Random, held_out: bool, invented: float) -> str:
    """One of the words that this side of the split may use, or an invented one."""
    if rng.random() < invented:
        return " ".join(invented_word(rng) for _ in range(rng.choice((1, 1, 2))))
    while True:
        word = rng.choice(words)
        if (word.split("/")[0] in HELD_OUT) == held_out:
            return word


def pick_doing(rng: random.Random, held_out: bool, invented: float) -> str:
    """Something that people do, such as `hiking` or `playing chess`."""
    if rng.random() >= invented * 0.8:
        return pick(DOINGS, rng, held_out, 0.0)
    word, other = invented_word(rng), pick(ANIMALS, rng, held_out, 0.6)
    verb = pick(DOINGS, rng, held_out, 0.0).split()[0] if rng.random() < 0.4 else f"{word}ing"
    forms = (verb, f"{other} {verb}", f"{verb} {other}", f"{verb} the {other}", f"{verb} a {other}")
    return rng.choice(forms)
