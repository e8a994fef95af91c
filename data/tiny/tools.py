"""The text of the world: its tools, and the ways in which a person asks for them. Data only.

    key: (names, descriptions, parameters, phrasings)

names, descriptions    a record shows one of each; names are separated by spaces, descriptions by " / "
parameters             {key: (names, values)}; a key that ends in "?" is optional. values: a key of POOLS in
                       phrases.py (a string, made up or one of these words), a range (an integer), a tuple
                       (an enum) or bool
phrasings              one per line; those after the line "--" are held out as unseen phrasings

A phrasing without a full stop or question mark is an order, which can become "Could you ...?" (see ORDERS in
phrases.py). In a phrasing

    {song}                    is replaced by the value;
    [ at volume {volume}]     is left out if the request has no such argument;
    (daily: every day)        is the text for true; (spicy:, spicy|, not spicy) also has one for false;
    (mode: by car| by bike)   has one text for each value of an enum, in the enum's order.

A request mentions an argument in these places only. Counts start at 2, so that nouns can always be plural.
"""

from data.tiny.more_tools import MORE_TOOLS

TOOLS = {
    "play_song": (
        "play_song start_music music_player", "Play a song / Start some music",
        {"song": ("song track title", "title"), "volume?": ("volume loudness", range(5, 100))}, """
        play {song}[ at volume {volume}]
        put on {song}[, volume {volume}]
        start {song}[ and set the volume to {volume}]
        let me hear {song}[ at volume {volume}]
        play the song {song}[ with the volume at {volume}]
        turn on some music, the song {song}[, at volume {volume}]
        I want to hear {song}[ at volume {volume}].
        I feel like listening to {song}[, volume {volume}].
        I would love some music now, maybe {song}[ at volume {volume}].
        Is there a way to hear {song}[ at volume {volume}]?
        It is too quiet here, so play {song}[ at volume {volume}].
        Some music would be good: {song}[ at volume {volume}].
        --
        put {song} on[ and set the volume to {volume}]
        I would like to hear the song {song}[, at volume {volume}]."""),
    "set_timer": (
        "set_timer start_timer countdown", "Start a timer / Count down some minutes",
        {"minutes": ("minutes duration", range(2, 100)), "label?": ("label name", "dish")}, """
        set a timer for {minutes} minutes[ and call it {label}]
        start a timer of {minutes} minutes[ for the {label}]
        count down {minutes} minutes[ for the {label}]
        start the clock at {minutes} minutes[ for the {label}]
        tell me when {minutes} minutes are over[ for the {label}]
        let me know in {minutes} minutes[ that the {label} is ready]
        I need a timer for {minutes} minutes[, named {label}].
        I have {minutes} minutes left[ for the {label}], so start a timer.
        [the {label} is in the oven, so ]set a timer for {minutes} minutes.
        Can I have a timer for {minutes} minutes[ with the name {label}]?
        Timer, {minutes} minutes[, label {label}].
        In {minutes} minutes[, when the {label} is ready,] the timer should ring.
        --
        have a timer ring in {minutes} minutes[ for the {label}]
        I want a timer for {minutes} minutes[ with the label {label}]."""),
    "set_alarm": (
        "set_alarm wake_up alarm_clock", "Set an alarm / Wake someone up",
        {"hour": ("hour time", range(2, 12)), "part": ("part half", ("morning", "evening")),
         "daily?": ("daily repeat", bool)}, """
        wake me at {hour} in the {part}(daily: every day)
        set an alarm for {hour} in the {part}(daily: every day)
        get me up at {hour} in the {part}(daily: every day| only this once)
        set the alarm clock to {hour} in the {part}(daily:, each day)
        make sure I am up at {hour} in the {part}(daily: every day| just this once)
        ring the alarm at {hour} in the {part}(daily: each day)
        I have to get up at {hour} in the {part}(daily: every day).
        I need an alarm at {hour} in the {part}(daily:, each day|, only once).
        Do not let me sleep past {hour} in the {part}(daily:, today and every day).
        In the {part} I must be up at {hour}(daily:, every day).
        Is there an alarm at {hour} in the {part}(daily: each day)? I need one.
        Alarm at {hour} in the {part}(daily:, every day|, only once).
        --
        have the alarm ring at {hour} in the {part}(daily: each day)
        In the {part}, wake me at {hour}(daily:, every day|, only once)."""),
    "get_weather": (
        "get_weather weather_report forecast", "Get the weather in a city / Look up a weather forecast",
        {"city": ("city place location", "place"), "day?": ("day date", ("today", "tomorrow", "weekend"))}, """
        tell me the weather in {city}(day: for today| for tomorrow| for the weekend)
        look up the weather in {city}(day: today| tomorrow| this weekend)
        check the forecast for {city}(day: today| tomorrow| this weekend)
        What is the weather like in {city}(day: today| tomorrow| this weekend)?
        How cold will it be in {city}(day: today| tomorrow| on the weekend)?
        Will it rain in {city}(day: today| tomorrow| this weekend)?
        Do I need an umbrella in {city}(day: today| tomorrow| this weekend)?
        Is it going to be sunny in {city}(day: today| tomorrow| this weekend)?
        Should I take a warm coat to {city}(day: today| tomorrow| this weekend)?
        I am going to {city}(day: today| tomorrow| this weekend). Will it be warm?
        I would like the forecast for {city}(day: for today| for tomorrow| for the weekend).
        Weather in {city}(day:, today|, tomorrow|, this weekend), please.
        --
        Is it warm in {city}(day: today| tomorrow| this weekend)?
        check what the weather is like in {city}(day: today| tomorrow| on the weekend)"""),
    "send_message": (
        "send_message write_message text", "Send a message to a person / Write to someone",
        {"person": ("person recipient contact", "person"), "topic": ("topic subject", "topic"),
         "silent?": ("silent quiet", bool)}, """
        text {person} about {topic}(silent:, but without a sound)
        write to {person} about {topic}(silent:, silently)
        send {person} a (silent:silent )message about {topic}
        let {person} know about {topic}(silent:, but without a sound)
        tell {person} about {topic}(silent: in a silent message)
        message {person} about {topic}(silent:, silently)
        drop {person} a line about {topic}(silent:, without a sound|, with a sound)
        I need to tell {person} about {topic}(silent:, but with no sound).
        I have to write {person} a few words about {topic}(silent:, silently).
        Does {person} know about {topic}? If not, send a (silent:silent )message.
        Can {person} get a (silent:silent )message about {topic}?
        Message for {person}: {topic}(silent:, without a sound|, with a sound).
        --
        send a (silent:silent )message about {topic} to {person}
        I want to text {person} about {topic}(silent:, without a sound)."""),
    "set_lights": (
        "set_lights dim_lights light_switch", "Set the light in a room / Change how bright a room is",
        {"room": ("room area", "room"), "percent": ("percent brightness", range(5, 100))}, """
        set the {room} lights to {percent} percent
        dim the lights in the {room} to {percent} percent
        make the {room} {percent} percent bright
        turn the {room} light to {percent}
        bring the light in the {room} to {percent} percent
        put the lamps in the {room} at {percent} percent
        change the light in the {room} to {percent} percent
        I want the {room} to be {percent} percent bright.
        The light in the {room} should be at {percent} percent.
        It is too dark in the {room}, so set the light to {percent}.
        Can the {room} lights go to {percent} percent?
        Lights in the {room}, {percent} percent.
        --
        set the lamps to {percent} percent in the {room}
        I need the lights in the {room} at {percent} percent."""),
    "set_heating": (
        "set_heating set_temperature thermostat", "Set the heating / Change how warm it is",
        {"degrees": ("degrees temperature", range(12, 30)), "room?": ("room area", "room")}, """
        set the heating[ in the {room}] to {degrees} degrees
        turn the heating[ in the {room}] to {degrees}
        make it {degrees} degrees[ in the {room}]
        bring the temperature[ in the {room}] to {degrees} degrees
        change the thermostat[ in the {room}] to {degrees} degrees
        keep it at {degrees} degrees[ in the {room}]
        I want it to be {degrees} degrees warm[ in the {room}].
        I am cold, so make it {degrees} degrees[ in the {room}].
        It should be {degrees} degrees[ in the {room}].
        It is not warm enough[ in the {room}]. Make it {degrees} degrees.
        Can we have {degrees} degrees[ in the {room}]?
        Heating[ in the {room}] to {degrees} degrees.
        --
        set the thermostat to {degrees}[ in the {room}]
        I would like the temperature[ in the {room}] to be {degrees} degrees."""),
    "translate": (
        "translate translate_word dictionary", "Translate a word / Say a word in another language",
        {"word": ("word term", "topic"), "language": ("language target_language", ("french", "german", "spanish",
                                                                                   "turkish"))}, """
        translate {word} into {language}
        put {word} into {language}
        tell me the {language} word for {word}
        give me the word {word} in {language}
        say {word} in {language}
        What is {word} in {language}?
        How do you say {word} in {language}?
        What would {word} be in {language}?
        In {language}, what do people call {word}?
        I need the word {word} in {language}.
        I do not know the {language} word for {word}.
        I am learning {language} and want to know how to say {word}.
        --
        What is the {language} word for {word}?
        I would like to know how to say {word} in {language}."""),
    "find_route": (
        "find_route get_directions navigate", "Find the way to a place / Give directions to a place",
        {"destination": ("destination target", "place"), "origin?": ("origin start", "place"),
         "mode?": ("mode travel_mode", ("car", "bike", "train"))}, """
        take me to {destination}[ from {origin}][ by {mode}]
        show me the way[ from {origin}] to {destination}[ by {mode}]
        find a route[ from {origin}] to {destination}[ by {mode}]
        guide me[ from {origin}] to {destination}[ by {mode}]
        get directions to {destination}[ from {origin}][, by {mode}]
        plan a route[ from {origin}] to {destination}(mode: for a car| for a bike| by train)
        How do I get[ from {origin}] to {destination}[ by {mode}]?
        Which way is it[ from {origin}] to {destination}(mode: if I drive| on my bike| on the train)?
        What is the best way[ from {origin}] to {destination}[ by {mode}]?
        I am lost and have to get to {destination}[ by {mode}].
        I need directions[ from {origin}] to {destination}(mode:, and I will drive|, on my bike|, by train).
        Directions[ from {origin}] to {destination}[, by {mode}].
        --
        find the way to {destination}[ from {origin}][ by {mode}]
        How can I get to {destination}[ from {origin}][ by {mode}]?"""),
    "add_note": (
        "add_note write_note save_note", "Write a note / Save something in the notes",
        {"topic": ("topic text content", "topic"), "folder?": ("folder notebook", "title")}, """
        make a note about {topic}[ in the folder {folder}]
        write down {topic}[ in the folder {folder}]
        save a note about {topic}[ in my {folder} folder]
        put {topic} in my notes[, folder {folder}]
        note down {topic}[ in the notebook {folder}]
        add {topic} to my notes[ in the folder {folder}]
        keep a note about {topic}[ in the notebook {folder}]
        I want to write down {topic}[ in the folder {folder}].
        I must not forget {topic}, so make a note[ in the folder {folder}].
        Did I write down {topic}[ in the folder {folder}]? If not, do it now.
        Note: {topic}[, folder {folder}].
        New note about {topic}[, in the folder {folder}].
        --
        write a note about {topic}[ in my {folder} notebook]
        I need a note about {topic}[ in the folder {folder}]."""),
    "add_event": (
        "add_event calendar plan_event", "Put an event in the calendar / Plan a meeting on a day",
        {"title": ("title event", "topic"), "day": ("day weekday", ("monday", "tuesday", "wednesday", "thursday",
                                                                    "friday")),
         "hour": ("hour time", range(8, 19))}, """
        put {title} in my calendar on {day} at {hour}
        add {title} to the calendar for {day} at {hour}
        plan {title} on {day} at {hour}
        keep {day} at {hour} free for {title}
        write {title} into the calendar for {day} at {hour}
        plan a meeting about {title} on {day} at {hour}
        I have {title} on {day} at {hour}, so put it in my calendar.
        There is a meeting about {title} on {day} at {hour}, please plan it.
        On {day} at {hour} I have {title}, keep that in my calendar.
        Can we meet about {title} on {day} at {hour}?
        Is {day} at {hour} free? If so, plan {title}.
        Meeting on {day} at {hour}: {title}.
        --
        put {title} on {day} at {hour} into my calendar
        On {day}, plan a meeting about {title} at {hour}."""),
    "add_item": (
        "add_item shopping_list add_product", "Add something to the shopping list / Write down what to buy",
        {"item": ("item product", "thing"), "count": ("count quantity", range(2, 40))}, """
        add {count} packs of {item} to the shopping list
        put {count} bags of {item} on my shopping list
        write {count} packs of {item} on the list
        get {count} bags of {item} the next time we shop
        remember that we have to buy {count} packs of {item}
        make that {count} bags of {item} on the shopping list
        I need {count} packs of {item} from the shop.
        We are out of {item}, so add {count} packs to the list.
        We need {count} more bags of {item}.
        We have no {item} left, so we have to buy {count} bags.
        Are {count} bags of {item} on the shopping list? If not, add them.
        Shopping list: {item}, {count} packs.
        --
        put {item} on the shopping list, {count} bags
        We have to buy {count} more packs of {item}."""),
    "book_table": (
        "book_table reserve_table restaurant_booking", "Book a table at a restaurant / Reserve seats for a meal",
        {"restaurant": ("restaurant place", "title"), "guests": ("guests people", range(2, 16)),
         "hour": ("hour time", range(5, 12))}, """
        book a table for {guests} at {restaurant} at {hour}
        reserve a table at {restaurant} for {guests} people at {hour}
        get us a table at {restaurant}, {guests} people, at {hour}
        find {guests} seats for dinner at {restaurant} at {hour}
        ask {restaurant} for a table for {guests} at {hour}
        We are {guests} people and want to eat at {restaurant} at {hour}.
        I want to have dinner at {restaurant} at {hour}, with {guests} people.
        At {hour} we eat at {restaurant}, so reserve a table for {guests}.
        We need a table for {guests} guests at {hour}, at {restaurant}.
        Is there a table for {guests} at {restaurant} at {hour}?
        Does {restaurant} have seats for {guests} people at {hour}?
        Table at {restaurant} at {hour}, {guests} guests.
        --
        book a table at {restaurant} at {hour} for {guests} guests
        I would like a table for {guests} people at {restaurant} at {hour}."""),
    "book_flight": (
        "book_flight buy_flight fly", "Book a flight / Buy a plane ticket",
        {"origin": ("origin start", "place"), "destination": ("destination target", "place"),
         "round_trip": ("round_trip return_trip", bool)}, """
        book a (round_trip:return|one way) flight from {origin} to {destination}
        find me a flight from {origin} to {destination}, (round_trip:there and back|one way only)
        fly me from {origin} to {destination}(round_trip: and back|, one way)
        get me a (round_trip:return|one way) plane ticket to {destination} from {origin}
        buy a plane ticket from {origin} to {destination}, (round_trip:with return|one way)
        I need to fly from {origin} to {destination}(round_trip: and back|, one way).
        I want a (round_trip:return|one way) flight to {destination} that starts in {origin}.
        We are flying to {destination} from {origin}, (round_trip:there and back|but not back).
        Is there a (round_trip:return|one way) flight from {origin} to {destination}?
        Can I fly from {origin} to {destination}(round_trip: and back|, one way)?
        From {origin} I have to fly to {destination}(round_trip: and back again|, only one way).
        Flight from {origin} to {destination}, (round_trip:with return|one way).
        --
        buy me a (round_trip:return|one way) flight from {origin} to {destination}
        I would like to fly to {destination} from {origin}, (round_trip:there and back|one way)."""),
    "book_hotel": (
        "book_hotel reserve_hotel hotel_room", "Book a hotel / Reserve a hotel room in a city",
        {"city": ("city place location", "place"), "nights": ("nights stay", range(2, 22)),
         "breakfast?": ("breakfast morning_meal", bool)}, """
        book a hotel in {city} for {nights} nights(breakfast: with breakfast| without breakfast)
        find me a hotel in {city} for {nights} nights(breakfast: with breakfast| without breakfast)
        reserve a hotel room in {city} for {nights} nights(breakfast:, with breakfast)
        get us a room in {city}, {nights} nights(breakfast:, with breakfast|, no breakfast)
        I need a place to sleep in {city} for {nights} nights(breakfast:, with breakfast).
        I am in {city} for {nights} nights and need a hotel(breakfast: with breakfast| without breakfast).
        We will be in {city} for {nights} nights, so book a room(breakfast: with breakfast).
        I want to stay {nights} nights in {city}(breakfast:, and I want breakfast|, and I need no breakfast).
        Is there a hotel room in {city} for {nights} nights(breakfast: with breakfast| without breakfast)?
        Can we sleep in {city} for {nights} nights(breakfast: and have breakfast)?
        Where can I stay in {city} for {nights} nights(breakfast: with breakfast| without breakfast)?
        Hotel in {city}, {nights} nights(breakfast:, with breakfast|, no breakfast).
        --
        book a room in {city} for {nights} nights(breakfast:, with breakfast|, no breakfast)
        I would like to stay in {city} for {nights} nights(breakfast: with breakfast| without breakfast)."""),
    "order_food": (
        "order_food order_meal delivery", "Order a meal / Have food brought home",
        {"dish": ("dish food meal", "dish"), "size": ("size portion", ("small", "medium", "large")),
         "spicy?": ("spicy hot", bool)}, """
        order a {size} portion of {dish}(spicy:, spicy|, not spicy)
        get me some {dish}, {size} size(spicy:, spicy|, not spicy)
        bring me a {size} portion of (spicy:spicy ){dish}
        order some {dish} for dinner, {size}(spicy: and spicy| and not spicy)
        I want {dish} for dinner, a {size} portion(spicy:, and make it spicy|, but not spicy).
        I am hungry, so order a {size} portion of {dish}(spicy:, the hot kind).
        I could eat a {size} portion of (spicy:hot ){dish} now.
        We will have one {size} portion of {dish}(spicy:, spicy|, not spicy).
        Can I have a {size} portion of {dish}(spicy:, spicy|, not spicy)?
        Is there some (spicy:spicy ){dish} to order? A {size} portion, please.
        Tonight we eat {dish}, {size} size(spicy:, spicy|, not spicy).
        Dinner: {dish}, {size}(spicy:, hot|, not hot).
        --
        have a {size} portion of {dish} brought here(spicy:, spicy|, not spicy)
        I would like some {dish} for dinner, {size} size(spicy:, spicy|, not spicy)."""),
    "call_person": (
        "call_person phone_call dial", "Call a person / Phone someone",
        {"person": ("person contact recipient", "person"), "video?": ("video video_call", bool)}, """
        call {person}(video: with video| without video)
        phone {person}(video:, with video|, without video)
        dial {person}(video:, and turn on the video)
        get {person} on the phone(video: with video)
        start a (video:video )call with {person}
        let me talk to {person}(video: on video)
        I want to talk to {person}(video: on video| without video).
        I need to speak to {person} now(video:, with video|, but no video).
        I have to make a (video:video )call to {person}.
        Can I talk to {person}(video: on video)?
        Is {person} free for a (video:video )call?
        Phone call to {person}(video:, with video|, no video).
        --
        make a (video:video )call to {person}
        I would like to speak to {person}(video: on video)."""),
    "convert_money": (
        "convert_money exchange currency", "Convert money / Change money into another currency",
        {"amount": ("amount value", range(2, 100)), "source": ("source source_currency", ("usd", "eur", "gbp", "jpy")),
         "target": ("target target_currency", ("usd", "eur", "gbp", "jpy"))}, """
        convert {amount} {source} to {target}
        change {amount} {source} into {target}
        exchange {amount} {source} for {target}
        work out {amount} {source} in {target}
        tell me what {amount} {source} is in {target}
        How much is {amount} {source} in {target}?
        What would {amount} {source} be in {target}?
        How many {target} do I get for {amount} {source}?
        I have {amount} {source} and want to know how much that is in {target}.
        I need {amount} {source} in {target}.
        The price is {amount} {source}, but I think in {target}.
        From {source} to {target}: {amount}.
        --
        How much {target} is {amount} {source}?
        I want to change {amount} {source} to {target}."""),
} | MORE_TOOLS
