"""The text of the world: its tools, and the ways in which a person asks for them. Nothing here but data.

    key: (names, descriptions, parameters, phrasings)

names, descriptions    a record shows one of each; names are separated by spaces, descriptions by " / "
parameters             {key: (names, values)}; a key that ends in "?" is optional. values: a word of POOLS below (a
                       string, made up or taken from there), a range (an integer), a tuple (an enum) or bool
phrasings              one a line; those below the line "--" are held out as unseen phrasings

A phrasing without a full stop or question mark is an order and may be dressed as "Could you ...?" (see ORDERS). In it

    {song}                    stands for the value;
    [ at volume {volume}]     is said only where that argument is given;
    (daily: every day)        is said where the argument is true, (spicy:, spicy|, not spicy) also where it is false;
    (mode: by car| by bike)   has one text for each value of an enum, in the enum's order.

Everything a request says about an argument stands in one of these. Counts begin at 2, so no plural goes wrong.
"""

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
    "find_recipe": (
        "find_recipe get_recipe cook_book", "Find a recipe / Look up how to cook a dish",
        {"dish": ("dish food meal", "dish"), "minutes?": ("minutes max_minutes", range(10, 99)),
         "vegan?": ("vegan vegan_food", bool)}, """
        find a (vegan:vegan )recipe for {dish}[ that takes {minutes} minutes]
        show me how to cook {dish}[ in {minutes} minutes](vegan:, the vegan way)
        look up a (vegan:vegan )recipe for {dish}[, {minutes} minutes]
        teach me to make (vegan:vegan ){dish}[ in {minutes} minutes]
        How do I make (vegan:vegan ){dish}[ in {minutes} minutes]?
        How do people cook {dish}[ if they have {minutes} minutes]?
        What do I need to cook (vegan:vegan ){dish}[ in {minutes} minutes]?
        Is there a (vegan:vegan )way to cook {dish}[ in {minutes} minutes]?
        I want to cook {dish}(vegan: without meat or milk)[ and have {minutes} minutes].
        I would love to make (vegan:vegan ){dish} tonight[, but I only have {minutes} minutes].
        We are cooking {dish} and need a (vegan:vegan )recipe[ that takes {minutes} minutes].
        Recipe for (vegan:vegan ){dish}[, {minutes} minutes].
        --
        look up how to make (vegan:vegan ){dish}[ in {minutes} minutes]
        I need a (vegan:vegan )recipe for {dish}[ that takes {minutes} minutes]."""),
    "track_parcel": (
        "track_parcel parcel_status find_package", "Find out where a parcel is / Track a package",
        {"shop": ("shop sender", "title"), "notify?": ("notify alert", bool)}, """
        track my parcel from {shop}(notify: and tell me when it is here)
        find my package from {shop}(notify: and let me know when it moves)
        check where the parcel from {shop} is(notify: and keep me posted)
        look for the package that {shop} sent me
        see if my parcel from {shop} is on its way(notify: and send me an alert when it is here)
        Where is my parcel from {shop}(notify:, and can I get an alert)?
        When will my package from {shop} be here?
        Is the package from {shop} on its way?
        Did {shop} send my parcel?
        I am waiting for a parcel from {shop}(notify:, so alert me when it is here).
        I want to know where my package from {shop} is(notify:, with alerts|, without alerts).
        My parcel from {shop} is late. Where is it?
        --
        find out where my package from {shop} is(notify: and tell me when it is here)
        When will the parcel from {shop} be here?"""),
    "clean_room": (
        "clean_room start_vacuum robot", "Clean a room / Send the robot to clean a room",
        {"room": ("room area", "room"), "quiet?": ("quiet silent", bool)}, """
        clean the {room}(quiet: without a sound)
        vacuum the {room}(quiet:, but quietly)
        send the robot to the {room}(quiet:, and keep it quiet)
        start the vacuum in the {room}(quiet: in quiet mode)
        have the robot clean the {room}(quiet: quietly)
        make the {room} clean again(quiet:, but keep it quiet)
        I want the {room} to be clean(quiet:, but do it quietly).
        The {room} is not clean, so send the robot(quiet: in quiet mode).
        We have guests tonight, so clean the {room}(quiet: quietly).
        Can the robot do the {room}(quiet: quietly)?
        Is the {room} clean? If not, vacuum it(quiet: quietly).
        Robot, do the {room}(quiet:, and be quiet).
        --
        start the robot in the {room}(quiet:, but quietly)
        I need the {room} clean(quiet:, but without a sound)."""),
    "lock_door": (
        "lock_door door_lock set_lock", "Lock or open a door / Change the lock of a door",
        {"door": ("door door_name", ("front", "back", "garage")), "locked": ("locked closed", bool)}, """
        (locked:lock|open) the {door} door
        make sure the {door} door is (locked:locked|open)
        (locked:close and lock|open up) the {door} door
        turn the lock of the {door} door so that it is (locked:closed|open)
        keep the {door} door (locked:locked|open)
        see that the {door} door is (locked:locked|open)
        I want the {door} door to be (locked:locked|open).
        The {door} door should be (locked:locked|open) now.
        (locked:We are going out, so lock the {door} door.|We are back, so open the {door} door.)
        Can the {door} door be (locked:locked|open) tonight?
        Is the {door} door (locked:locked|open)? If not, (locked:lock|open) it.
        {door} door, (locked:lock|open) it now.
        --
        have the {door} door (locked:locked|open)
        I need the {door} door to be (locked:locked|open)."""),
    "buy_tickets": (
        "buy_tickets cinema_tickets film_seats", "Buy cinema tickets / Get seats for a film",
        {"film": ("film movie title", "title"), "count": ("count tickets", range(2, 13)),
         "row?": ("row seats", ("front", "middle", "back"))}, """
        buy {count} tickets for the film {film}[, in the {row}]
        get {count} cinema tickets for {film}[ in the {row} row]
        book {count} seats for {film}[ in the {row}]
        find us {count} seats for the film {film}[, {row} row]
        take {count} of us to see {film}[, {row} row]
        I want to see {film}, {count} tickets[, {row} row].
        We are {count} people and want to see {film}[ from the {row}].
        We need {count} tickets for {film}[, with seats in the {row}].
        There are {count} of us, and we would love to see {film}[ in the {row} row].
        Are there {count} seats left for {film}[ in the {row}]?
        Can we get {count} tickets for {film}[ in the {row} row]?
        Cinema: {film}, {count} tickets[, {row} row].
        --
        book {count} tickets for the film {film}[ in the {row} row]
        I would like {count} seats for {film}[, in the {row}]."""),
    "get_news": (
        "get_news news_search headlines", "Get the news about a topic / Look up news",
        {"topic": ("topic subject", "topic"), "count?": ("count limit", range(2, 20))}, """
        show me the news about {topic}[, only {count} lines]
        get the latest[ {count}] headlines about {topic}
        read me[ {count} pieces of] news about {topic}
        look up what is new with {topic}[, {count} headlines]
        tell me the latest about {topic}[ in {count} headlines]
        find[ {count}] news stories about {topic}
        What is new about {topic}[, in {count} headlines]?
        What do the[ {count} latest] headlines say about {topic}?
        Is there news about {topic}[, say {count} headlines]?
        I want to read[ {count}] news stories about {topic}.
        I did not see the news today. Is there anything about {topic}?
        News about {topic}[, {count} headlines].
        --
        get me[ {count}] news stories about {topic}
        What is the latest news about {topic}[, in {count} headlines]?"""),
    "set_reminder": (
        "set_reminder remind reminder", "Set a reminder / Remind someone of something later",
        {"topic": ("topic text", "topic"), "hours": ("hours delay", range(2, 49))}, """
        remind me of {topic} in {hours} hours
        set a reminder about {topic} in {hours} hours
        make me think of {topic} in {hours} hours
        come back to me about {topic} in {hours} hours
        in {hours} hours, remind me of {topic}.
        I have to think of {topic} in {hours} hours.
        I will forget {topic}, so remind me in {hours} hours.
        I need a reminder about {topic}, {hours} hours from now.
        Can I get a reminder of {topic} in {hours} hours?
        Will you remind me of {topic} in {hours} hours?
        In {hours} hours I have to do something about {topic}, so remind me.
        Reminder in {hours} hours: {topic}.
        --
        remind me {hours} hours from now of {topic}
        I want a reminder about {topic} in {hours} hours."""),
    "send_money": (
        "send_money transfer_money pay", "Pay a person / Send money to someone",
        {"person": ("person recipient", "person"), "amount": ("amount value", range(2, 100)),
         "currency?": ("currency unit", ("usd", "eur", "gbp", "jpy"))}, """
        pay {person} {amount}[ {currency}]
        send {amount}[ {currency}] of my money to {person}
        transfer {amount}[ {currency}] to {person}
        give {person} {amount}[ {currency}] from my account
        pay back the {amount}[ {currency}] that {person} gave me
        move {amount}[ {currency}] to {person}, from my account
        I have to pay {person} {amount}[ {currency}].
        I want to transfer {amount}[ {currency}] to {person}.
        {person} paid for dinner, so send {amount}[ {currency}] back.
        {person} should get {amount}[ {currency}] from me.
        Can I pay {amount}[ {currency}] to {person}?
        Money for {person}: {amount}[ {currency}].
        --
        send {person} {amount}[ {currency}] from my account
        I need to pay {amount}[ {currency}] back to {person}."""),
    "find_contact": (
        "find_contact get_contact address_book", "Look up how to reach a person / Find someone in the contacts",
        {"person": ("person name", "person"), "field": ("field info", ("number", "email", "address"))}, """
        look up the {field} of {person}
        find the (field:phone number|email address|home address) of {person}
        show me the {field} I have for {person}
        get me the (field:phone number|email|address) of {person} from my contacts
        tell me (field:the phone number of {person}|the email of {person}|where {person} lives)
        search my contacts for the {field} of {person}
        What is the {field} of {person}?
        (field:On which number do I call|To which email do I write to|At which address do I find) {person}?
        Do I have the (field:phone number|email address|home address) of {person}?
        I need the (field:phone number|email|address) of {person}.
        I forgot the {field} of {person}.
        Contacts: {person}, {field}.
        --
        find {person} in my contacts and tell me the {field}
        What (field:phone number|email|home address) do I have for {person}?"""),
    "make_drink": (
        "make_drink coffee_machine brew", "Make coffee or tea / Start the coffee machine",
        {"drink": ("drink kind", ("coffee", "espresso", "tea")), "cups": ("cups count", range(2, 10)),
         "sugar?": ("sugar sweet", bool)}, """
        make {cups} cups of {drink}(sugar: with sugar| without sugar)
        brew {cups} cups of {drink}(sugar:, with sugar|, no sugar)
        start the machine for {cups} cups of {drink}(sugar:, sweet|, not sweet)
        bring us {cups} cups of {drink}(sugar: with sugar)
        prepare {drink} for {cups} people(sugar:, with sugar|, without sugar)
        get {cups} cups of (sugar:sweet ){drink} ready
        I want {cups} cups of {drink}(sugar: with sugar| without sugar).
        We are {cups} people and would love some {drink}(sugar: with sugar).
        I am tired and need {cups} cups of {drink}(sugar:, sweet|, not sweet).
        Can we have {cups} cups of {drink}(sugar:, with sugar|, no sugar)?
        Is there {drink} for {cups} people(sugar:, with sugar)?
        {drink}, {cups} cups(sugar:, with sugar|, no sugar).
        --
        prepare {cups} cups of (sugar:sweet ){drink}
        We would like {cups} cups of {drink}(sugar: with sugar| without sugar)."""),
}

# No training record knows these: neither the tool nor a way to ask for it. Their words do occur in training, in other
# company, so that what is tested is reading and not the knowledge of a word.
UNSEEN = {
    "book_train": (
        "book_train buy_train train_ticket", "Book a train / Buy a train ticket",
        {"origin": ("origin start", "place"), "destination": ("destination target", "place"),
         "hour?": ("hour time", range(5, 24))}, """
        book a train from {origin} to {destination}[ at {hour}]
        buy a train ticket from {origin} to {destination}[, at {hour}]
        get me on the train from {origin} to {destination}[ at {hour}]
        find me a train to {destination} that starts in {origin}[ at {hour}]
        reserve seats on the train from {origin} to {destination}[ at {hour}]
        I need a train from {origin} to {destination}[ at {hour}].
        I want to take the train from {origin} to {destination}[ at {hour}].
        We have to get to {destination} by train, from {origin}[, at {hour}].
        Is there a train from {origin} to {destination}[ at {hour}]?
        Can I get a train ticket to {destination} from {origin}[ for {hour}]?
        From {origin} I would like a train to {destination}[ at {hour}].
        Train from {origin} to {destination}[, {hour}]."""),
    "show_film": (
        "show_film start_film play_video", "Show a film / Play a film at home",
        {"film": ("film movie title", "title"), "room?": ("room area", "room")}, """
        show the film {film}[ in the {room}]
        start the film {film}[ in the {room}]
        play the film {film}[ in the {room}]
        put on the film {film}[ in the {room}]
        show us the film {film}[ in the {room}]
        let me see the film {film}[ in the {room}]
        I want to see the film {film} at home[, in the {room}].
        I would love a film tonight, maybe {film}[, in the {room}].
        We feel like a film[ in the {room}], so show {film}.
        Can we see the film {film} here[, in the {room}]?
        Is there a way to see the film {film} at home[, in the {room}]?
        Film for tonight[ in the {room}]: {film}."""),
    "send_email": (
        "send_email write_email email", "Send an email to a person / Write an email",
        {"person": ("person recipient contact", "person"), "topic": ("topic subject", "topic")}, """
        send {person} an email about {topic}
        write an email to {person} about {topic}
        email {person} about {topic}
        tell {person} about {topic} in an email
        let {person} know about {topic} by email
        send an email about {topic} to {person}
        I need to email {person} about {topic}.
        I have to write {person} an email about {topic}.
        I want to send {person} an email: {topic}.
        Can {person} get an email about {topic}?
        Did I email {person} about {topic}? If not, do it now.
        Email to {person} about {topic}."""),
    "book_room": (
        "book_room reserve_room meeting_room", "Book a meeting room / Reserve a room for a meeting",
        {"people": ("people guests", range(2, 30)), "hour": ("hour time", range(8, 19)),
         "day?": ("day weekday", ("monday", "tuesday", "wednesday", "thursday", "friday"))}, """
        book a meeting room for {people} people at {hour}[ on {day}]
        reserve a room for a meeting of {people} people[ on {day}] at {hour}
        find us a meeting room at {hour}[ on {day}], for {people} people
        get a meeting room for {people}[ on {day}] at {hour}
        keep a meeting room free for {people} people at {hour}[ on {day}]
        I need a meeting room at {hour}[ on {day}] for {people} people.
        We are {people} people and need a meeting room at {hour}[ on {day}].
        We meet at {hour}[ on {day}], so reserve a room for {people}.
        There is a meeting at {hour}[ on {day}], so book a room for {people} people.
        Is there a meeting room for {people} at {hour}[ on {day}]?
        Can we have a meeting room for {people} people at {hour}[ on {day}]?
        Meeting room[ on {day}] at {hour}, {people} people."""),
    "set_volume": (
        "set_volume loudness sound", "Set the volume / Change the volume of the sound in a room",
        {"volume": ("volume loudness", range(5, 100)), "room?": ("room area", "room")}, """
        set the volume[ in the {room}] to {volume}
        turn the volume[ in the {room}] to {volume}
        change the sound[ in the {room}] to volume {volume}
        bring the volume to {volume}[ in the {room}]
        make the volume {volume}[ in the {room}]
        put the sound[ in the {room}] at {volume} percent
        I want the volume at {volume}[ in the {room}].
        The volume[ in the {room}] should be {volume}.
        It is too quiet[ in the {room}], so set the volume to {volume}.
        Can the sound go to volume {volume}[ in the {room}]?
        I need the volume[ in the {room}] to be {volume}.
        Volume {volume}[ in the {room}]."""),
    "find_restaurant": (
        "find_restaurant restaurant_search food_search", "Find a restaurant in a city / Look up where to eat",
        {"city": ("city place location", "place"), "dish?": ("dish food meal", "dish"),
         "vegan?": ("vegan vegan_food", bool)}, """
        find a (vegan:vegan )restaurant in {city}[ to eat {dish}]
        look up where to eat[ {dish}] in {city}(vegan:, vegan)
        show me a (vegan:vegan )restaurant in {city}[ with {dish}]
        look for a (vegan:vegan )restaurant in {city}[ for {dish}]
        tell me where to eat[ {dish}] in {city}(vegan:, the vegan way)
        Where can I eat[ {dish}] in {city}(vegan:, vegan only)?
        Is there a good (vegan:vegan )restaurant in {city}[ for {dish}]?
        Which (vegan:vegan )restaurant in {city} is good[ for {dish}]?
        I am in {city} and want to eat[ {dish}](vegan:, but only vegan).
        We are hungry and in {city}. Where do people eat[ {dish}](vegan: without meat or milk)?
        I need a place to eat[ {dish}] in {city}(vegan:, vegan).
        Restaurant in {city}[ with {dish}](vegan:, vegan only)."""),
}

# How an order may be dressed. {a} is the order, {A} the same with a capital letter.
ORDERS = ["{A}.", "{A}.", "{A}.", "{A}, please.", "Please {a}.", "Could you {a}?", "Can you {a}?", "Would you {a}?",
          "I want you to {a}.", "Hello, {a}.", "Could you please {a}?", "Now {a}."]

# How two requests are joined, by the kinds of both: o an order, q a question, s a statement.
JOINS = {"oo": ["{A}, and {b}.", "{A}, then {b}.", "{A} and {b}.", "Please {a}, and then {b}.", "First {a}, then {b}.",
                "Could you {a}, and also {b}?", "{A}. Also, {b}.", "I want you to {a} and then {b}."],
         "other": ["{A} {B}", "{A} And {b}", "{A} Also, {b}", "{A} One more thing: {b}"]}

# Nothing for a tool: talk with its reply, and what no tool of this world does.
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

# Think lines: what to do for one call, and how a single argument is said in it; and where no tool fits.
THOUGHTS = [("tool {name}; {arguments}", "{key} = {value}", "; "),
            ("I use {name}: {arguments}.", "{key} is {value}", ", "),
            ("The tool is {name}. It needs {arguments}.", "{key} {value}", " and "),
            ("{name}, because it says: {description}. So {arguments}.", "{key}: {value}", ", ")]
NO_THOUGHTS = ["no tool", "I only have {names}. No tool fits.", "No tool here fits, so I say so.",
               "The tools are {names}, and they do not do this."]
TALK_THOUGHTS = ["no tool; talk", "This needs no tool, only a reply.", "They only want to talk, so I reply."]

# Real words among the made-up ones. The tokenizer knows none of them: they are spelled, like any word one might type.
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
