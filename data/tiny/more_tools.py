"""More tools of the world, and UNSEEN, the tools that training never shows. tools.py explains the format."""

MORE_TOOLS = {
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

# Training records contain neither these tools nor requests for them. All their words occur in other training
# text, so they test reading, not vocabulary.
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
