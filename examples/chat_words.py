"""The words of examples/chat_data.py: what stories are asked for, and how."""

# By kind: a story of one can be told of another of its kind.
KINDS = {
    "animals": """fox wolf bear lion tiger elephant monkey horse pony donkey cow ox bull calf goat sheep lamb pig dog
        puppy cat kitten mouse rat rabbit hare squirrel deer stag leopard crocodile snake frog toad turtle tortoise
        fish whale shark crab hen cock chicken duck goose swan eagle hawk raven crow owl sparrow peacock pigeon dove
        stork bird bee ant spider beetle snail worm dragon unicorn dinosaur bat mole otter""",
    "men": """king prince giant dwarf wizard magician soldier sailor captain pirate miller tailor shoemaker fisherman
        farmer shepherd hunter huntsman merchant robber thief beggar doctor teacher cook baker smith blacksmith knight
        boy father brother uncle grandfather son emperor sultan priest gardener woodcutter butcher barber servant judge
        ogre troll ghost elf robot man""",
    "women": """queen princess witch fairy mermaid girl mother sister daughter grandmother aunt stepmother bride wife
        lady maiden""",
    "children": "child baby",
    "places": """castle palace tower garden forest mountain hill river lake sea well mill kitchen church island city
        town bridge house farm school ship boat road""",
    "things": """tree apple rose flower ring sword crown mirror lamp box bag purse shoe dress coat hat ball doll toy
        book letter picture song bell candle key door cake egg stone feather carpet train balloon""",
    "riches": "gold silver treasure",
    "skies": "snow storm wind rain sun moon star fire cloud",
    "days": "feast wedding birthday",
}
NOUNS = [noun for nouns in KINDS.values() for noun in nouns.split()]
# Never asked for in training: what a request for something new gets.
UNSEEN = """hedgehog giraffe kangaroo zebra penguin camel badger nightingale parrot butterfly monk carpenter goblin
    nurse widow cave cottage umbrella clock lantern""".split()  # noqa: SIM905 (a quoted list is no easier to read)
# As often verbs, names or other words: a passage that holds these is not about them.
AMBIGUOUS = ("rose", "well", "smith", "train")
IRREGULAR = {
    "wolf": "wolves",
    "calf": "calves",
    "thief": "thieves",
    "mouse": "mice",
    "goose": "geese",
    "ox": "oxen",
    "sheep": "sheep",
    "deer": "deer",
    "fish": "fish",
    "child": "children",
    "wife": "wives",
    "city": "cities",
}
UNCOUNTED = ("gold", "silver", "treasure", "snow", "wind", "rain", "fire")
ONLY_ONE = ("sun", "moon", "sea")
ADJECTIVES = ("little", "old", "young", "clever", "brave", "wise", "strange", "beautiful", "big", "kind")
WORDINGS = (
    "Tell me a story about {a}.",
    "Please tell me a story about {a}.",
    "Tell me a tale of {a}.",
    "Tell me about {a}.",
    "I would like to hear a story about {a}.",
    "Can you tell me a story about {a}?",
    "A story about {a}, please.",
    "Do you know a story about {a}?",
    "Write a story about {a}.",
    "Write me a short story about {a}.",
    "Once more: a story with {a} in it.",
    "Let me hear about {a}.",
    "What happened to {a}?",
    "{a}",
)
# Never used in training.
UNSEEN_WORDINGS = (
    "I want to hear a tale about {a}.",
    "Could you make up a story about {a}?",
    "Is there a story in which {a} comes up?",
    "Now then, tell us all about {a}!",
)
NEXT = ("And now one about {a}.", "Now tell me about {a}.", "Another, about {a}, please.", "What about {a}?")
GO_ON = ("Go on.", "And then?", "What happened next?", "Please go on.", "More, please.")
SMALL_TALK = (
    (("Hello!", "Hello.", "Hi!", "Good evening.", "Good morning!"), "Good day! What shall my story be about?"),
    (
        ("Who are you?", "What are you?"),
        "I am a small story-teller, made from old children's books. Ask me for a story.",
    ),
    (("What can you do?", "Help me."), "I can tell stories. Say, for example: Tell me a story about a fox."),
    (("Thank you!", "Thanks.", "That was nice."), "You are welcome. Shall I tell you another?"),
)
