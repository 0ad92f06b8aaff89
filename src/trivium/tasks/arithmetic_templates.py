"""The templates of generated word problems: sentences, the numbers that may stand in them, and the steps to the answer.

In a step, `{=}` is where the calculation stands: `48/2 = <<48/2=24>>24`. A step names its result, which later steps and
sentences may use. Numbers are drawn evenly from their ranges, both ends included.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Step:
    """One step of a solution: the name of its result, the expression over names and numbers, and its sentence."""

    name: str
    expression: str
    sentence: str


@dataclass(frozen=True)
class Template:
    """A kind of problem. `choices` are words drawn for a name; every result must be a whole number above 0."""

    name: str
    question: str
    numbers: Mapping[str, tuple[int, int]]
    steps: tuple[Step, ...]
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


PEOPLE = (
    *("Amara", "Bruno", "Chiyo", "Dalia", "Emeka", "Farah", "Goran", "Hanna", "Ivo", "Jorun", "Kavya", "Luca"),
    *("Mirela", "Nuri", "Oskar", "Paloma", "Quentin", "Rosa", "Sanjay", "Tove", "Ulla", "Viktor", "Wanda", "Yusuf"),
)
FRUIT = ("apples", "pears", "plums", "peaches", "lemons", "figs")
GOODS = ("notebooks", "candles", "mugs", "scarves", "lamps", "baskets")
TRIPS = ("bus", "train", "ferry", "tram")
CRAFTS = ("bracelets", "kites", "birdhouses", "bookmarks", "clay bowls", "paper stars")

TEMPLATES = (
    Template(
        "shelves",
        "{who} fills {a} shelves with {b} books each and puts {c} more books into a box. "
        "How many books does {who} put away?",
        {"a": (2, 15), "b": (4, 40), "c": (2, 60)},
        (
            Step("d", "a*b", "The shelves hold {=} books."),
            Step("e", "d+c", "With the box that makes {=} books."),
        ),
    ),
    Template(
        "orchard",
        "An orchard has {a} rows of {b} trees. A storm fells {c} of them, and {who} plants {d} new ones. "
        "How many trees are there now?",
        {"a": (4, 20), "b": (5, 25), "c": (2, 19), "d": (3, 30)},
        (
            Step("e", "a*b", "Before the storm there were {=} trees."),
            Step("f", "e-c", "The storm left {=} trees."),
            Step("g", "f+d", "After the planting there are {=} trees."),
        ),
    ),
    Template(
        "market",
        "{who} sells {a} {fruit} for ${b} each and {c} jars of honey for ${d} each. "
        "How many dollars does {who} take in?",
        {"a": (5, 60), "b": (1, 6), "c": (2, 25), "d": (4, 15)},
        (
            Step("e", "a*b", "The {fruit} bring in {=} dollars."),
            Step("f", "c*d", "The honey brings in {=} dollars."),
            Step("g", "e+f", "Together that is {=} dollars."),
        ),
        {"fruit": FRUIT},
    ),
    Template(
        "change",
        "{who} buys {a} {goods} at ${b} each and pays with ${c}. How many dollars does {who} get back?",
        {"a": (2, 12), "b": (2, 15), "c": (30, 200)},
        (
            Step("d", "a*b", "The {goods} cost {=} dollars."),
            Step("e", "c-d", "{who} gets back {=} dollars."),
        ),
        {"goods": GOODS},
    ),
    Template(
        "savings",
        "{who} has ${a} and saves ${b} every week. A bicycle costs ${c}. How many weeks must {who} save to buy it?",
        {"a": (10, 150), "b": (4, 25), "c": (120, 500)},
        (
            Step("d", "c-a", "{who} still needs {=} dollars."),
            Step("e", "d/b", "That takes {=} weeks."),
        ),
    ),
    Template(
        "twice",
        "{who} collects {a} stamps in spring and {b} times as many in summer. In autumn {who} gives {c} of them away. "
        "How many stamps does {who} have left?",
        {"a": (6, 80), "b": (2, 6), "c": (3, 70)},
        (
            Step("d", "a*b", "In summer {who} collected {=} stamps."),
            Step("e", "a+d", "By the end of summer that was {=} stamps."),
            Step("f", "e-c", "After the gifts {=} stamps are left."),
        ),
    ),
    Template(
        "half",
        "A library lends {a} books on Friday and half as many on Saturday. "
        "How many books does it lend on the two days?",
        {"a": (12, 900)},
        (
            Step("b", "a/2", "On Saturday it lent {=} books."),
            Step("c", "a+b", "On both days it lent {=} books."),
        ),
    ),
    Template(
        "sharing",
        "{who} bakes {a} trays of {b} rolls, keeps {c} rolls and shares the rest evenly among {d} neighbours. "
        "How many rolls does each neighbour get?",
        {"a": (2, 12), "b": (6, 24), "c": (2, 20), "d": (2, 9)},
        (
            Step("e", "a*b", "{who} baked {=} rolls."),
            Step("f", "e-c", "To share there were {=} rolls."),
            Step("g", "f/d", "Each neighbour gets {=} rolls."),
        ),
    ),
    Template(
        "journey",
        "A {trip} goes {a} kilometres an hour for {b} hours and then {c} kilometres an hour for {d} hours. "
        "How many kilometres does it go?",
        {"a": (20, 120), "b": (2, 9), "c": (15, 110), "d": (2, 8)},
        (
            Step("e", "a*b", "At first it went {=} kilometres."),
            Step("f", "c*d", "Then it went {=} kilometres."),
            Step("g", "e+f", "In all it went {=} kilometres."),
        ),
        {"trip": TRIPS},
    ),
    Template(
        "wages",
        "{who} earns ${a} an hour and works {b} hours a day on {c} days. Of the pay, ${d} go to rent. "
        "How many dollars are left?",
        {"a": (8, 30), "b": (3, 9), "c": (4, 22), "d": (50, 700)},
        (
            Step("e", "b*c", "{who} works {=} hours."),
            Step("f", "a*e", "For that {who} earns {=} dollars."),
            Step("g", "f-d", "After the rent {=} dollars are left."),
        ),
    ),
    Template(
        "boxes",
        "A workshop packs {a} {craft} into boxes of {b}. Each full box sells for ${c}. "
        "How many dollars do all the boxes bring in?",
        {"a": (24, 600), "b": (3, 24), "c": (5, 40)},
        (
            Step("d", "a/b", "There are {=} boxes."),
            Step("e", "d*c", "They bring in {=} dollars."),
        ),
        {"craft": CRAFTS},
    ),
    Template(
        "ages",
        "{who} is {a} years old. A cousin is {b} times as old, and an aunt is {c} years older than the cousin. "
        "How many years old is the aunt?",
        {"a": (3, 14), "b": (2, 4), "c": (2, 30)},
        (
            Step("d", "a*b", "The cousin is {=} years old."),
            Step("e", "d+c", "The aunt is {=} years old."),
        ),
    ),
    Template(
        "percent",
        "A coat costs ${a}. In a sale its price falls by {b} percent. How many dollars does the coat cost in the sale?",
        {"a": (20, 400), "b": (5, 75)},
        (
            Step("c", "a*b/100", "The price falls by {=} dollars."),
            Step("d", "a-c", "In the sale the coat costs {=} dollars."),
        ),
    ),
    Template(
        "garden",
        "A garden is {a} metres long and {b} metres wide. A metre of fence costs ${c}. "
        "How many dollars does a fence around the garden cost?",
        {"a": (6, 60), "b": (4, 45), "c": (3, 20)},
        (
            Step("d", "2*(a+b)", "Around the garden it is {=} metres."),
            Step("e", "d*c", "The fence costs {=} dollars."),
        ),
    ),
    Template(
        "reading",
        "A novel has {a} pages. {who} reads {b} pages on each of {c} days and wants to read the rest in {d} days, "
        "the same number each day. How many pages a day is that?",
        {"a": (150, 700), "b": (8, 40), "c": (3, 9), "d": (2, 12)},
        (
            Step("e", "b*c", "{who} has read {=} pages."),
            Step("f", "a-e", "There are {=} pages left."),
            Step("g", "f/d", "That is {=} pages a day."),
        ),
    ),
    Template(
        "teams",
        "At a camp {a} children form teams of {b}. Each team gets {c} ropes and {d} flags. "
        "How many ropes and flags are handed out in all?",
        {"a": (24, 240), "b": (3, 12), "c": (2, 9), "d": (1, 8)},
        (
            Step("e", "a/b", "There are {=} teams."),
            Step("f", "c+d", "Each team gets {=} things."),
            Step("g", "e*f", "In all {=} things are handed out."),
        ),
    ),
    Template(
        "tank",
        "A tank holds {a} litres. A pump fills in {b} litres a minute while {c} litres a minute leak out. "
        "How many minutes does it take to fill the empty tank?",
        {"a": (60, 900), "b": (12, 60), "c": (2, 11)},
        (
            Step("d", "b-c", "Each minute {=} litres stay in the tank."),
            Step("e", "a/d", "Filling it takes {=} minutes."),
        ),
    ),
    Template(
        "marbles",
        "{who} has {a} red marbles, {b} fewer blue ones, and as many green ones as red and blue together. "
        "How many marbles does {who} have?",
        {"a": (15, 120), "b": (2, 60)},
        (
            Step("c", "a-b", "There are {=} blue marbles."),
            Step("d", "a+c", "There are {=} green marbles."),
            Step("e", "a+c+d", "In all there are {=} marbles."),
        ),
    ),
    Template(
        "average",
        "{who} walks {a} steps on Monday, {b} on Tuesday and {c} on Wednesday. "
        "How many steps a day is that on average?",
        {"a": (500, 9000), "b": (500, 9000), "c": (500, 9000)},
        (
            Step("d", "a+b+c", "On the three days that is {=} steps."),
            Step("e", "d/3", "On average it is {=} steps a day."),
        ),
    ),
    Template(
        "concert",
        "A hall has {a} rows of {b} seats. At a concert {c} seats stay empty, and each ticket costs ${d}. "
        "How many dollars do the tickets bring in?",
        {"a": (6, 30), "b": (8, 30), "c": (4, 47), "d": (3, 30)},
        (
            Step("e", "a*b", "The hall has {=} seats."),
            Step("f", "e-c", "There are {=} guests."),
            Step("g", "f*d", "The tickets bring in {=} dollars."),
        ),
    ),
)
