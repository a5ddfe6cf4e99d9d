"""The demo's input: eight topics, five sentences each, no sentence sharing its telling words with its neighbours."""

TOPICS: dict[str, tuple[str, ...]] = {
    "cooking": (
        "Simmer the tomatoes with garlic until the sauce thickens.",
        "She kneaded the dough for ten minutes and left it to rise overnight.",
        "A pinch of saffron gives the rice its golden colour.",
        "Let the roast rest before carving, or all the juices will run out.",
        "He whisks egg whites into stiff peaks for a light chocolate mousse.",
    ),
    "astronomy": (
        "The telescope captured light from a galaxy thirteen billion years old.",
        "Jupiter's great red spot is a storm larger than our whole planet.",
        "A comet's tail always points away from the sun.",
        "When a massive star collapses, it may leave a black hole behind.",
        "Tonight Saturn's rings can be seen through a small backyard refractor.",
    ),
    "finance": (
        "The central bank raised interest rates by half a percentage point.",
        "Shareholders approved the merger despite falling quarterly profits.",
        "Diversifying a portfolio lowers the risk without giving up all the return.",
        "Inflation has eaten away the real value of most people's savings.",
        "The startup raised twenty million dollars in its second round of venture capital.",
    ),
    "football": (
        "The striker scored twice in the final minutes of the match.",
        "A late penalty sent the home team into extra time.",
        "The goalkeeper dived to his left and pushed the ball around the post.",
        "Fans filled the stadium hours before the derby kicked off.",
        "The referee showed a second yellow card for a reckless tackle in midfield.",
    ),
    "medicine": (
        "The patient was given antibiotics to fight the infection.",
        "Regular exercise lowers blood pressure and strengthens the heart.",
        "Surgeons replaced the damaged valve in a four-hour operation.",
        "The vaccine trains the immune system to recognise the virus.",
        "An MRI scan revealed a small tear in the knee ligament.",
    ),
    "music": (
        "The violinist tuned her instrument before the concerto began.",
        "He wrote the chorus in a minor key and modulated for the last verse.",
        "The drummer and the bass player locked into a slow funk groove.",
        "An orchestra of eighty musicians rehearsed the symphony all week.",
        "The jazz trio improvised over a twelve-bar blues until midnight.",
    ),
    "programming": (
        "The compiler refuses to build because of a missing semicolon.",
        "She fixed the memory leak by freeing the buffer after every request.",
        "Unit tests caught the regression before the code was merged.",
        "The function is called recursively until the list is empty.",
        "A race condition between two threads corrupted the hash table.",
    ),
    "weather": (
        "Heavy rain is expected along the coast tomorrow afternoon.",
        "A thick layer of fog delayed flights all morning.",
        "The heatwave broke temperature records in twelve cities.",
        "Snow covered the mountain passes earlier than usual this year.",
        "Gusts of up to a hundred kilometres per hour brought down trees and power lines.",
    ),
}

SENTENCES: tuple[str, ...] = tuple(sentence for group in TOPICS.values() for sentence in group)
TOPIC_OF: tuple[str, ...] = tuple(topic for topic, group in TOPICS.items() for _ in group)

# what the reader asks of the embeddings; none of them is in the list
QUESTIONS: tuple[str, ...] = (
    "how do I bake bread at home",
    "planets and stars in the night sky",
    "should I put my money into stocks",
    "goals scored in the cup final",
    "my program crashes with a bug",
    "is a storm coming this weekend",
)
