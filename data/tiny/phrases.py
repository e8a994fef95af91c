"""The text around the tools: forms of requests, small talk, refusals, think lines, real words. Data only."""

# Forms of an order. {a} is the order, {A} the same with a capital letter.
ORDERS = ["{A}.", "{A}.", "{A}.", "{A}, please.", "Please {a}.", "Could you {a}?", "Can you {a}?", "Would you {a}?",
          "I want you to {a}.", "Hello, {a}.", "Could you please {a}?", "Now {a}."]

# Forms of two requests in one: "oo" joins two orders, "other" everything else.
JOINS = {"oo": ["{A}, and {b}.", "{A}, then {b}.", "{A} and {b}.", "Please {a}, and then {b}.", "First {a}, then {b}.",
                "Could you {a}, and also {b}?", "{A}. Also, {b}.", "I want you to {a} and then {b}."],
         "other": ["{A} {B}", "{A} And {b}", "{A} Also, {b}", "{A} One more thing: {b}"]}

# Requests that need no tool (small talk with its reply), and requests that no tool of this world can meet.
TALK = [("Hello!", "Hello! What can I do for you?"), ("Hello, how are you today?", "I am well. What can I do for you?"),
        ("Good morning!", "Good morning! What can I do for you?"), ("Good evening!", "Good evening! What do you need?"),
        ("Thank you!", "You are welcome."), ("Thank you, that is all for now.", "You are welcome."),
        ("That was good, thank you.", "You are welcome."), ("What can you do?", "I can call the tools you give me."),
        ("Who are you?", "I am a small model that calls tools."), ("My name is {person}.", "Hello, {person}!"),
        ("I am {person}, and who are you?", "Hello, {person}! I am a small model that calls tools."),
        ("Say hello to {person}.", "Hello, {person}!")]
OUTSIDE = ["Write me a poem about {topic}.", "Tell me a joke.", "Tell me a joke about {topic}.", "How old is {person}?",
           "Who won the game last night?", "What is the meaning of {topic}?", "Does {person} like me?",
           "Paint me a picture of {person}.", "What should I do with my life?", "Can you teach me to dance?",
           "Is {person} right about {topic}?", "Why is the sky blue?", "What do you think of {topic}?",
           "Feed the dog, please.", "I lost my keys. Where are they?", "Fix my bike, please."]
REFUSALS = ["I have no tool for that.", "None of my tools can do that.", "Sorry, my tools cannot do that.",
            "That is not something my tools can do.", "I would need another tool for that."]

# Think lines: the form of a call, of an argument in it, and the text between arguments; lines without a call.
THOUGHTS = [("tool {name}; {arguments}", "{key} = {value}", "; "),
            ("I use {name}: {arguments}.", "{key} is {value}", ", "),
            ("The tool is {name}. It needs {arguments}.", "{key} {value}", " and "),
            ("{name}, because it says: {description}. So {arguments}.", "{key}: {value}", ", ")]
NO_THOUGHTS = ["no tool", "I only have {names}. No tool fits.", "No tool here fits, so I say so.",
               "The tools are {names}, and they do not do this."]
TALK_THOUGHTS = ["no tool; talk", "This needs no tool, only a reply.", "They only want to talk, so I reply."]

# Real words, mixed with the made-up ones. None of them is a token: the tokenizer spells them as any unknown word.
POOLS = {
    "person": "maria nora rosa lena mila dana karim tomas samira nadia pavel marta lukas kira ravi nina leo fatima "
              "pedro bruno carla felipe gina ivan julia simon sara tariq vera zoe",
    "place": "lima cairo turin paris porto malaga verona geneva havana manila nairobi toronto kyoto delhi madrid "
             "berlin dakar bogota sofia riga rome lisbon vienna dublin boston tunis seville krakow osaka accra",
    "dish": "pizza risotto ramen tacos curry pasta salad lasagna paella sushi soup noodles dumplings falafel stew "
            "goulash lentils gnocchi burritos kebab",
    "thing": "rice butter flour pepper tomatoes potatoes bananas lemons beans carrots cocoa soap salt nuts "
             "raisins onions peppers cookies candles",
    "title": "bolero carmen tosca aurora nevada marina sahara corona fidelio casablanca pinocchio vertigo "
             "macbeth pandora lucia caruso rosetta",
    "topic": "taxes golf tennis football physics history politics jazz chess gardening poetry karate wine robots "
             "pirates planets volcanoes penguins ballet sailing",
    "room": "kitchen bedroom bathroom cellar balcony attic hallway office studio library nursery lobby",
}
