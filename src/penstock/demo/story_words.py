"""Words of the stories. A bar separates choices."""

GIRLS = "Lily|Mia|Anna|Lucy|Emma|Nora|Zoe|Ella|Rosa|Clara|Ivy|Sara|Maya|Tilda|Greta|Hanna|June|Alma|Daisy|Flora"
BOYS = "Tom|Ben|Max|Sam|Leo|Finn|Jack|Oscar|Theo|Hugo|Paul|Emil|Noah|Otto|Tim|Peter|Karl|Felix|Milo|Anton"
BEASTS = (
    "fox|bear|rabbit|mouse|owl|cat|dog|duck|frog|hedgehog|squirrel|pony|goose|turtle|badger|lamb|otter|beaver|mole|"
    "sparrow|dragon|elephant|lion|penguin|monkey|puppy|kitten|wolf|deer|goat"
)
PEOPLE = (
    "farmer|baker|fisherman|gardener|teacher|miller|sailor|shoemaker|painter|queen|king|princess|prince|giant|wizard"
)
TRAITS = "little|small|brave|kind|clever|shy|young|curious|happy|friendly|quiet|funny|gentle|cheerful|careful|lively"
VILLAGES = (
    "in a small village|in a quiet town|near a big forest|in a little house by the sea|on a farm|at the edge of a wood|"
    "by a blue lake|in a valley between two hills|on a small island|in a white house on a hill|beside a slow river|"
    "in a warm country|under a tall tree|behind the old mill|in a busy city|at the end of a long road"
)
PLACES = (
    "the forest|the park|the beach|the garden|the river|the hill|the market|the meadow|the lake|the old mill|the farm|"
    "the library|the playground|the bridge|the harbor|the orchard|the big oak tree|the barn|the cave|the field"
)
TOYS = (
    "ball|kite|doll|boat|drum|hat|book|box|cup|scarf|bell|basket|toy car|teddy bear|whistle|lantern|spoon|bag|key|"
    "shoe|coat|ring|puzzle|train|flute|button|blanket|umbrella|coin|pencil"
)
COLORS = "red|blue|green|yellow|white|golden|silver|purple|brown|orange|pink|black"
FOODS = "bread|soup|apples|cake|cookies|berries|cheese|honey|pancakes|nuts|pears|milk and bread|warm pie|carrots"
WEATHERS = (
    "the sun was shining|it was raining|the wind was blowing|it was very cold|snow lay on the ground|the sky was blue|"
    "there was fog over the fields|it was warm and bright|dark clouds were in the sky|a rainbow stood over the hill"
)
TIMES = (
    "one day|one morning|one evening|one sunny day|one rainy day|one fine day|on a cold winter day|"
    "one summer morning|early one morning|one afternoon|one night|on a Sunday|in the spring|one quiet evening|"
    "at the beginning of the holidays"
)
FEELINGS = "happy|glad|proud|thankful|very happy|full of joy"
LESSONS = (
    "it is good to help each other|sharing makes everybody happy|being brave does not mean being without fear|"
    "a friend is better than gold|it is worth trying again|kind words open many doors|it is best to tell the truth|"
    "small people can do big things|patience is a good friend|"
    "nobody has to be alone|listening is as important as talking"
)
NOISES = "a strange sound|a soft cry|a loud noise|somebody singing|a small voice|a splash|a knock|a whisper"
