"""Words that raise an alarm, words that take it back, and the rules that need no model to call it an emergency.

Why an AI engineer keeps such a list: a learned model can be wrong in a way nobody foresaw, and here a miss is the worst
error. The rules of `floor` are few, readable by a clinician, and always on; the flags behind them are also features of the
learned head in `triage.py`, which weighs them against everything else a message says. Every flag is a regular expression
over lower-case text; the spellings are those people use, not those of a textbook.
"""

from __future__ import annotations

import re

_BODY = r"(lips?|mouth|face|toes?|fingers?|tongue|hands?|foot|feet|legs?|nails?)"
_COLOUR = r"(blue|bluish|purple|mauve|dusky|grey|gray|funny colour|mottled|marbl\w+|blotchy)"

#: alarm -> spellings
ALARMS: dict[str, str] = {
    "chest pressure": r"(weight|elephant|band|strap|fist|vice|squeez\w*|crush\w*|tight\w*|heav\w+|pressure|clutch\w*|brick"
    r"|belt)"
    r"\b.{0,40}\b(chest|ribs|breastbone)|\b(chest|ribs|breastbone)\b.{0,30}\b(weight|elephant|band|fist|vice|squeez\w*|crush\w*"
    r"|tight\w*|heav\w+|pressure|pains?|hurts?|aches?)|\bsat on me|chest pains?",
    "arm or jaw": r"\b(left )?(arm|jaw|shoulder)s?\b.{0,20}\b(ach\w+|heavy|dead|numb|hurt\w*|pain\w*|tingl\w+|weak)"
    r"|rubbing (his|her|my) arm|(down|into|up) (my|his|her|the) (left )?(arm|jaw|neck)",
    "sweat or grey": r"\b(clammy|dripping|drenched|soaked|wet through|(cold )?sweat\w*|gone (grey|gray|white)|ashen|waxy"
    r"|so pale"
    r"|very pale|white as|funny colour|damp|she'?s grey|he'?s grey|looks? grey)\b",
    "collapse": r"\b(collaps\w*|went down|keel\w*|slump\w*|(fell|hit|crashed) to the floor|out cold|pass(ed|es|ing)? out"
    r"|faint(ed|ing)?|black(ed|ing) out|blackout|like a tree|knocked out|dropped to the (floor|ground))\b",
    "will not wake": r"\b((won'?t|can'?t|cannot|not|doesn'?t|hard to) (be |properly |really )*(wake|waking|rouse|come round"
    r"|roused"
    r"|woken|waken)|won'?t open (his|her) eyes|unconscious|unresponsive|not responding|no response|keeps (dropping off"
    r"|drifting)"
    r"|keep (him|her|them) awake|stay awake|drifting off|floppy|limp|rag ?doll|lifeless|very (drowsy|sleepy))\b",
    "not breathing": r"\b(not breathing|stopped breathing|isn'?t breathing|no breath|gasp\w*|snort\w*|gurgl\w*|get (my |his "
    r"|her |any "
    r"|enough )?(air|breath)\b|chok(ing|ed|es)|(fighting|struggl\w+|desperate) (to|for) (breathe?|air)\w*|drowning)\b",
    "hard breathing": r"\b(wheez\w*|pant(s|ing)|puff(ing)|out of breath|breathless|short(ness)? of breath|suck(s|ing|ed)? in"
    r"|heaving|crow(ing|s)|whistl\w*|rattl\w*|grunt\w*|stridor|finish (a|his|her) sentence|strug\w* to breathe|(can'?t|hard to"
    r"|hardly|barely|difficult to|trouble) (breathe|breathing)|raspy|snor(e|es|ing)|noisy breath\w*|breathing (fast|hard"
    r"|quick\w*))\b",
    "blue or blotchy": rf"\b{_COLOUR}\b.{{0,25}}\b{_BODY}|\b{_BODY}\b.{{0,35}}\b{_COLOUR}",
    "face droop": r"\b(face|mouth|lips?|smile|cheek|eyelids?|eye)\b.{0,35}\b(droop\w*|drop\w*|slid\w*|slip\w*|hang\w*|hung"
    r"|lopsided|one side|sag\w*|wonky|crooked|won'?t (shut|stay up|close))|dribbl\w+ (his|her|my)",
    "speech": r"\b(slur\w*|gibberish|words? (are |come |came |coming )?(out )?(wrong|right|jumbled|muddled)|get (my|his"
    r"|her) words"
    r"|talk\w* (like|rubbish|nonsense|gibberish|funny)|voice has gone|sound\w* drunk|like (he|she|i)('?s|'?m| was| were) drunk"
    r"|can'?t (speak|talk|find (his|her|my) words)|nonsense|mumbl\w*)\b",
    "one side weak": r"\b(arm|leg|hand|side)\b.{0,30}\b(hang\w*|dead|limp|weak\w*|won'?t (move|lift|work)|can'?t (lift|move)"
    r"|numb"
    r"|useless|paraly\w*)|can'?t (lift|move|feel) (the |his |her |my )?(\w+ )?(arm|leg|hand|cup|side)",
    "confused": r"\b(confus\w*|doesn'?t (know|recogni[sz]e) (what|where|who|our|me|his|her|us|it)|thinks (i'?m|she'?s|he'?s"
    r"|it'?s)"
    r"|calling me|muddled|delirious|not making sense|makes? no sense|swinging at|seeing things|not (him|her)self"
    r"|disorient\w*)\b",
    "fit": r"\b(a fit|fits|fitting|seizures?|convuls\w*|jerk\w*|shook all over|went stiff|stiff and|eyes rolled|twitching)\b",
    "sudden worst pain": r"\b(worst|nothing has ever|never (had|known|felt)|(out of|from) nowhere|thunder\w*|hit me like"
    r"|explod\w*"
    r"|sudden\w*)\b.{0,60}\b(head\w*|pain|hurt\w*|agony)|\bhead\w*\b.{0,50}\b(worst|never known|(out of|from) nowhere|sudden\w*"
    r"|explod\w*|nothing has ever)|grabbed (her|his|my) head",
    "stiff neck or light": r"\b(neck (is |feels? )?(so |very )?(stiff|rigid|won'?t bend|hurts)|stiff neck|chin (down|on|to)"
    r"|bend (his|her|my) neck|light hurts|hates? the light|(look at|bear|stand) (the )?(light|window)s?|shields? (his"
    r"|her) eyes)\b",
    "rash that stays": r"\b(glass|tumbler)\b|\b(spots?|dots?|rash|blotch\w*)\b.{0,50}\b(don'?t|doesn'?t|won'?t|not) (fade|go"
    r"|disappear"
    r"|blanch|vanish)|(purple|red|dark) (spots?|dots?|pinpricks)|purple rash|tiny bruises",
    "swelling throat": r"\b(tongue|throat|lips?|mouth|face|eyes)\b.{0,45}\b(swell\w*|swollen|swelled|fat|thick|too big|clos\w+"
    r"|puff\w*"
    r"|balloon\w*|straw|tight\w*)|\b(swollen|swelling|puffy)\b.{0,20}\b(tongue|throat|lips?|face)|squeaky|voice has gone",
    "cannot swallow": r"\b(drool\w*|spit (is )?(running|coming)|dribbling (and|spit|down)|(can'?t|won'?t|cannot"
    r"|unable to)( even)? "
    r"(swallow|open (my|his|her) mouth)|mouth is full|finger'?s width)\b",
    "heavy bleeding": r"\b(blood(?! thin)|bleed\w*|it'?s|period|cut|nose)\b.{0,50}\b(won'?t (stop|quit)|pour\w*|gush\w*|soak\w*"
    r"|spurt\w*|pump\w*|flood\w*|jelly|clots?|keeps coming|not stopping|solid red|fountain|still (pour|bleed|drip|gush|com)\w*)"
    r"|(third|fourth|two|three|four"
    r"|another) (towels?"
    r"|pads?)\b|soaked (two|three|four|through)|through (a|two|three) pads?",
    "blood from inside": r"\b(sick|vomit\w*|thr(ew|ow)\w* up|brought up|bringing up|cough\w* (it )?up|spat"
    r"|spit\w*)\b.{0,40}\b(blood"
    r"|red|coffee|grainy|grounds|pink|cafetiere)|jet black|like tar|tarry|black (poo|stools?|and sticky)|(bowl|water|pan)( is"
    r"|'?s) "
    r"(\w+ )?red|pink (froth|bubbles|foam)|blood\b.{0,15}\b(cough|sick|vomit)",
    "green sick": r"\b(green|bile|grass|bilious)\b.{0,30}\b(sick|vomit\w*|throw\w*)|\b(sick|vomit\w*|bring\w* up"
    r"|brought up)\b.{0,40}"
    r"\b(green|grass|bile)\b",
    "high fever": r"\b(3[89]([.,]\d)?|4[0-2]([.,]\d)?)\b(?! ?(weeks?|wks?|years?|yrs?|days?|st|th|kg|min\w*|over|/|per"
    r"|degrees out))"
    r"|boiling|burning (hot|up)|roasting|scorching|high (temp\w*|fever)|temp of|\bhot too\b|feverish|very hot|raging (temp"
    r"|fever)",
    "shivering": r"\b(shak(ing|es) (with|so|from|all)|shiver\w*|teeth (are |is )?(chatter\w*|rattl\w*|won'?t stop)|the shakes"
    r"|rigors?"
    r"|bed rattles|get warm|then freezing|freezing then)\b",
    "young baby": r"\b((twelve|eleven|ten|nine|eight|seven|six|five|four|three|two|one|\d{1,2})[- ]?(weeks?|wks?|days?)[- ]old"
    r"|newborn"
    r"|new ?born|new baby|the baby|our baby|my baby)\b",
    "no urine": r"\b((not|haven'?t|hasn'?t|no) (had |done |been (for )?)?a? ?(wee|pee|weed|peed|wees)\b|no wet napp\w+"
    r"|dry napp\w+"
    r"|napp\w+ (is |are )?(still )?dry|can'?t (pee|wee)|won'?t start|bladder'?s like|not a wee|passed no)\b",
    "keeps being sick": r"\b((can'?t|cannot) (keep|stop)( \w+)?|keeps? (throwing|being|bringing)|come straight back"
    r"|comes? back up"
    r"|nothing stays|throwing up|keep nothing|brings? everything)\b",
    "hard belly": r"\b(belly|tummy|stomach|abdomen)\b.{0,50}\b(hard|rigid|board|drum|football|rock|swollen|scream\w*|tight as"
    r"|touch)"
    r"|not even wind|(tear|ripp)ing pain|\bstabbing\b",
    "numb saddle": r"\b(numb|no feeling|can'?t feel)\b.{0,40}\b(down below|between (my|his|her) legs|bottom|saddle|bike seat"
    r"|bum|groin"
    r"|private\w*|sit|wip\w+)|accident in (his|her|my) trousers|wet (my|him|her)self|lost control of",
    "weak legs": r"\blegs?\b.{0,25}\b(jelly|cotton|rubbery|fold|give|gave|gone|won'?t hold)|do the stairs"
    r"|\b(climb\w*|spread\w*|crept|creeping|moved up|going up|up to my|up past)\b.{0,40}\b(thighs?|hips?|knees?|calf|waist"
    r"|chest|arm)"
    r"|red (line|streak)s?",
    "sight": r"\b(can'?t see|lost (my|his|her) (sight|vision)|gone blind|see(s|ing)? double|double vision|curtain|misty|fog"
    r"|halos?|haloes"
    r"|(can'?t|won'?t) open (it|his eye|her eye)|eye (sticks|bulg)\w*|moving it is|bleary|zigzags?|flashing lights"
    r"|make out my face)\b",
    "chemical": r"\b(acid|bleach|drain\w*|cleaner|chemical|caustic|ammonia|lye|stuff)\b.{0,50}\b(in|into|up)\b.{0,15}\b(eyes?"
    r"|face|mouth)"
    r"|\b(eyes?|face|mouth|swallow\w*|drank|drunk)\b.{0,50}\b(acid|bleach|cleaner|caustic)",
    "poison": r"\b(swallow\w*|took|taken|ate|eaten|drank|overdos\w*|too many|all (the|my|his|her))\b.{0,60}\b(pills?|tablets?"
    r"|paracetamol"
    r"|ibuprofen|capsules?|medicine|bleach|berries|batter(y|ies)|magnets?|nicotine|painkillers|aspirin)\b"
    r"|\bpills?\b.{0,30}\bopen",
    "suicide": r"\b(kill(ing)? (my|him|her|your)self|ending (my|his|her|their|your|it) ?(all|life)?|thoughts? of (ending|dying"
    r"|killing)|suicid\w*|end (it|my life|things)|end it all|be here (tomorrow|in the morning"
    r"|much longer)"
    r"|(i'?ve |i have )?(written|wrote) (the |a |my )?(letters?|notes?)|(don'?t|do not) want to (be here|live|wake up|go on)"
    r"|want to (die"
    r"|be dead)|no point (in )?(living|going on)|better off (without me|dead)|be where (she|he) is|(tablets"
    r"|pills) (are )?(all )?lined up"
    r"|looking at the bridge|jump off|(can'?t|cannot) (go on|do this any ?more|face another)|hang myself|goodbyes?"
    r"|hurt(ing)? myself"
    r"|cut(ting)? my wrists|saved up (all )?(my|the|a drawer)|take the lot|quickest way out)\b",
    "harm to a child": r"\b(what i'?ll do to (him|her|the baby|them)|pillow in my hands|(harm|shake|shook|smother\w*) (my"
    r"|the) baby"
    r"|hand over (her|his) mouth|voices (are )?tell\w*)\b",
    "pregnancy danger": r"\b(weeks|wks|pregnan\w*|days late|expecting)\b.{0,90}\b(bleed\w*|blood|leak\w*|headache|head"
    r"|zigzags?|stabbing"
    r"|pain|soaked|shoulder|not mov\w*|moving less|hard every|panting|vision|lights|waters)|baby'?s? (hasn'?t|has not|not"
    r"|stopped) mov\w*"
    r"|(not|haven'?t|hardly) felt (the |my )?baby",
    "head injury": r"\b(bang\w*|hit|hits|fell|knock\w*|tackle|crack\w*|bump\w*|came off|thump\w*)\b.{0,60}\b(head|skull)"
    r"|\b(watery|clear)"
    r" (stuff|fluid|liquid)\b.{0,30}\b(ear|nose)|from (his|her|my) ear",
    "limb in danger": r"\b(plaster|cast|toes|fingers|foot|hand|leg|arm)\b.{0,60}\b(can'?t feel|cold|white|numb|black|tighter"
    r"|mauve|pointing"
    r"|bent|out of shape|stink\w*|reek\w*|bone (is )?(out|through|showing))|bone sticking",
    "dead tissue": r"\b((turned|gone|went|going) (black|dusky)|dusky|reek\w*|stinks?|rotting|gangrene|crackl\w+ under)\b",
    "pain beyond": r"\b(out of this world|morphine|agony|worst pain|scream\w* (in|if|when)|unbearable|excruciat\w*|(can'?t"
    r"|cannot) stand up"
    r"|doubled up|pain\b.{0,20}\bcan'?t bear)\b",
    "clot": r"\b(calf|leg)\b.{0,40}\b(swollen|hot|tight)|stitch in my chest|sharp pain when (i|he|she) breathes?"
    r"|cough\w*.{0,20}blood",
    "racing heart": r"\b(heart|pulse)\b.{0,50}\b(hammer|crazy|racing|pound\w*|gallop\w*|count|going mad|won'?t slow"
    r"|still going|180|200)\b",
    "diabetic danger": r"\b(ketone\w*|meter (just )?says (hi|lo|high|low)\b|smell\w* (like|of) (pear|nail|fruit)\w*"
    r"|pear (sweets|drops)"
    r"|sugary|insulin|diabetic|type (1|one))\b",
    "cannot stand": r"\b((can'?t|cannot|won'?t|couldn'?t) (even )?(stand|walk|bear|get up|keep upright)|keep upright|toppl\w*"
    r"|stagger\w*"
    r"|walk\w* (like|straight)|across the room|falling over|pointing outwards)\b",
    "overheated": r"\b(heat|hot|sun|festival|boiling|roasting)\b.{0,70}\b(confus\w*|swing\w*|stopped sweating|walk straight"
    r"|collaps\w*|a fit)",
    "medicine fails": r"\b(puffer|inhaler|blue one|spray|spacer|puffs|goes|antidote|pen)\b.{0,70}\b(hasn'?t|not|still|all ten"
    r"|no (better"
    r"|difference)|ages|did nothing|doesn'?t)|did nothing|hasn'?t (shifted|helped|worked|touched)",
    "allergy": r"\b(sting|stung|peanuts?|nuts?|walnut|satay|prawns?|shellfish|capsule|penicillin|coloured my hair|hair dye"
    r"|antibiotics?"
    r"|tablet|ice cream|allerg\w*|milk|egg)\b.{0,90}\b(throat|tongue|lips?|wheez\w*|breath\w*|swoll\w*|swell\w*|faint\w*|rag"
    r"|pale|puff\w*"
    r"|voice)",
    "fever after travel": r"\b(home from|back from|since we (got|came|flew)|got back|returned from|nigeria|ghana|sierra leone"
    r"|kenya|uganda"
    r"|india|gambia|congo|tanzania|malawi|africa|thailand)\b.{0,90}\b(hot|fever\w*|boil\w*|freez\w*|shiver\w*|burn\w*|temp\w*"
    r"|chills)",
    "burn or smoke": r"\b(kitchen fire|house fire|smoke|burn(s|ed|t)?|scald\w*|electric\w*)\b.{0,60}\b(croaky|hoarse|black"
    r"|voice|blow my nose"
    r"|whole|white|leathery|baby|arm|chest)",
    "testicle": r"\b(testicles?|balls?|scrotum)\b.{0,60}\b(pain\w*|agony|swollen|sudden\w*|hurts?|kicked)",
    "eye in danger": r"\b(painful|sore|red|angry|throbbing)( red)? eye\b|\beye\b.{0,30}\b(agony|hurts? like|stab\w*|throb\w*"
    r"|burst\w*)"
    r"|\b(swell\w*|swollen|redness|puffy|red)\b.{0,20}\b(round|around|behind) (the|his|her|my|one) (eye|ear)",
    "sudden deafness": r"\b(suddenly|overnight|woke up)\b.{0,40}\b(deaf|can'?t hear|hearing (has )?gone)|lost (my|his|her"
    r"|all) hearing",
    "yellow": r"\b(yellow|jaundic\w*)\b.{0,20}\b(skin|eyes?|face)|\b(skin|eyes?)\b.{0,25}\byellow|gone yellow",
    "bite or wound": r"\b(snake|adder|viper)\b|\b(stab\w*|impaled|knife|nail|glass|stick)\b.{0,30}\b(in|into|through"
    r"|stuck)\b.{0,20}"
    r"\b(neck|chest|belly|leg|foot|hand|eye)|\b(bitten|cut|torn|hanging) off\b|\bbone\b.{0,15}\b(poking|pokes|sticking"
    r"|through)",
    "skin coming off": r"\bskin\b.{0,30}\b(peel\w*|coming off|sheets|blister\w*|raw)|\b(sores|blisters"
    r"|ulcers)\b.{0,25}\b(mouth|eyes?|lips)",
    "out of touch": r"\b(hear(s|ing) voices|seeing (people|things) (who|that)|plotting|being (watched|followed)|lost touch)\b",
    "in danger": r"\b(going to (kill|hurt) (me|us)|threaten\w* (me|us|to)|scared (he|she)'?ll|attacked me|not safe (here"
    r"|at home))\b",
    "too much medicine": r"\b(more than (it|the (packet|box|label|bottle)) says|double(d)? (the |my |his |her )?dose"
    r"|wrong (pills?|tablets?|dose)"
    r"|someone else'?s (pills?|tablets?|medicine))\b",
    "goes on": r"\b(ten|fifteen|twenty|thirty|[1-9]\d) min(ute)?s?\b|\bquarter of an hour|\bhalf an hour|\b(an|two"
    r"|three) hours?\b",
}

#: reassurance or tone -> spellings. These take an alarm back, or tell a fright from an emergency.
REASSURANCES: dict[str, str] = {
    "over": r"\b(it'?s stopped|has stopped|stopped (after|once|at|with|now|itself)|ok it stopped|eased|went off|goes off"
    r"|gone off"
    r"|all gone|passes|passed (in|after|now)|pops back|came back|let go|over in|back to|bounced back|sorted|settled"
    r"|better (today|now)"
    r"|cleared up|woke up at once|in seconds)\b",
    "well": r"\b(feel(s|ing)? (fine|well|ok|okay|good|perfectly|great|normal|silly)|perfectly well|i'?m fine|(he|she)'?s (fine"
    r"|cheerful"
    r"|happy|playing|eating|well|running)|been fine|all good|right as rain|(otherwise|quite|perfectly) (fine|well|normal|ok)"
    r"|(well|fine)"
    r" otherwise|happily|cheerful|playing|racing (around|round)|eating (and|ice)|drinking (and|plenty|fine)|normally)\b",
    "denied": r"\b(no|not|never|without|isn'?t|doesn'?t|didn'?t|hasn'?t)( a| any| had| got)? (fever|temperature|temp|pain"
    r"|blood|swelling"
    r"|rash|faint\w*|hurt|new|other|headache|weakness|vomit\w*|breath\w*|chest|bleeding|lump|injury)\b",
    "can": r"\b(breath\w*|swallow\w*|walk\w*|see|hear|move|wiggle|drink|eat|wee\w*|talk\w*) (fine|perfectly|well|easily"
    r"|normally|ok"
    r"|everything)|\bcan (walk|see|hear|feel|move|drink|wiggle|swallow|talk|breathe)\b",
    "usual": r"\b(same as (always|usual|every|last)|as usual|(my|the) usual|usual|like (all|always)|exactly (the same|like)"
    r"|every (evening"
    r"|night|morning|time)|same thing|always (been|the same)|as always)\b",
    "long": r"\b(for (two |three |four |several |a few |some |the past )?(weeks|months|years|a fortnight|ages)|third week"
    r"|(weeks|months) now"
    r"|(months|years|weeks) ago|since i was|in (20\d\d|january|february|march|april|may|june|july)|last (week|year|month"
    r"|summer|winter))\b",
    "exaggerated": r"\b(dying (of|here|for)|i'?m dying|am i (dying|going to die)|i could( have)? die|i died|i'?ll die"
    r"|thought i('?d| was) "
    r"(die|dying|a goner)|going to die|kill(s|ing|ed)? (me|us)|to death|honestly|i swear|literally|murder|horror film"
    r"|driving me)\b",
    "nearly called": r"\b(nearly|almost|do i (need|call|have)|should i (be )?call|have to call)\b.{0,20}\b(ambulance|call|rang"
    r"|phone|panic"
    r"|help|999)|the ambulance (came|took)|(had|by|in) (an|the) ambulance|ambulance (for|out|goes|crew|away)|ambulance\?",
    "asks": r"\?",
    "shouts": r"!",
    "small": r"\b(only (a|one|sore|hurts|when|itches|two|feel)|just (a|one|sore|flaky|nerves)|bit of|tiny|little spots?"
    r"|nick\w*|pinprick"
    r"|specks?|streak|smear|scratch\w*|shaving|paper cut|pricking|beetroot|blister|plaster (sorted|on))\b",
    "afraid": r"\b(scared|terrified|worried|panic|shame|embarrass\w*|crying|sobbing|laughing|boredom|nerves|stress\w*)\b",
    "played down": r"\b(probably (nothing|just|only|tired|unfit)|don'?t (want to )?(bother|make a fuss|waste|fuss)"
    r"|i'?m sure (i'?m|it'?s)"
    r"|i expect|keep telling myself|weird one|hate to|it'?s only my|just (my|his|her) usual|i know it'?s)\b",
    "in general": r"\b(what (are|is)|how (do|can|long|many|much|soon)|which|why|when (should|do|does|is|can)|can (i|you|we)"
    r"|is (it|there)"
    r"|should (i|we)|does|difference|signs? of|if (i|he|she|someone|they|the|my))\b",
}

_ALARMS = {name: re.compile(pattern) for name, pattern in ALARMS.items()}
_REASSURANCES = {name: re.compile(pattern) for name, pattern in REASSURANCES.items()}
#: right before an alarm: it is denied, over, or happened to somebody else at another time
_DENIED = re.compile(
    r"\b(no|not|never|without|isn'?t|aren'?t|wasn'?t|doesn'?t|didn'?t|don'?t|hasn'?t|haven'?t|nearly|almost|like|as if|thought"
    r"|afraid of"
    r"|worried about|risk of|had (a|an)|after (a|my|the)|last (week|month|year)|history of|prevent\w*|avoid\w*)( \w+){0,3} ?$"
)
#: anywhere in a sentence: it asks in general, or looks back
_GENERAL = re.compile(
    r"\b(what (are|is|does)|which|how (do|can|long|many|much|often|does|soon)|why|when (should|do|does|is|would)"
    r"|difference between|signs of"
    r"|if (i|he|she|someone|somebody|they|a|my|the|you|it)|(?<!minutes )(?<!hours )(?<!hour )ago"
    r"|last (week|month|year|summer|winter)|in (19|20)\d\d|used to"
    r"|years? (back|behind)|makes? people|chances?"
    r"|percent\w*|survival|prognosis|should i (call|worry)|feel(ing)? (well|fine) now|it'?s stopped|has stopped|passed (off"
    r"|now)|dying of)\b"
)

#: rule -> groups of alarms; it applies when every group has an alarm of its own that is present and not denied
FLOOR: dict[str, tuple[tuple[str, ...], ...]] = {
    "chest pressure with arm, sweat, breath or collapse": (
        ("chest pressure",), ("arm or jaw", "sweat or grey", "hard breathing", "not breathing", "collapse"),
    ),
    "signs of a stroke": (("face droop", "speech"), ("speech", "one side weak")),
    "signs of a stroke, face and arm": (("face droop",), ("one side weak",)),
    "not breathing, or blue": (
        ("not breathing", "hard breathing", "will not wake"), ("blue or blotchy", "will not wake", "collapse"),
    ),
    "will not wake and is confused, ill or hurt": (
        ("will not wake",), ("head injury", "high fever", "confused", "poison", "diabetic danger"),
    ),
    "a plan of suicide": (("suicide",),),
    "harm to a child": (("harm to a child",),),
    "throat closing": (("swelling throat",), ("allergy", "hard breathing", "not breathing")),
    "bleeding that does not stop": (("heavy bleeding",), ("collapse", "sweat or grey", "cannot stand", "blood from inside")),
    "bleeding that goes on": (("heavy bleeding",), ("goes on",)),
    "signs of meningitis": (("stiff neck or light", "rash that stays"), ("high fever", "confused", "will not wake")),
    "fever in a young baby": (("young baby",), ("high fever",)),
    "fighting for breath with a fever": (("hard breathing", "not breathing"), ("high fever", "shivering")),
    "a sudden pain that fells": (("sudden worst pain", "pain beyond"), ("cannot stand", "collapse")),
    "fit that does not stop": (("fit",), ("will not wake", "not breathing", "blue or blotchy")),
}  # fmt: skip

#: rules of one pattern, where counting matters
_PLAIN = {
    "overdose": re.compile(
        r"\b(took|taken|swallowed|i'?ve had|she had|he had)\b.{0,25}\b(about )?(ten|eleven|twelve|fifteen|twenty|thirty|forty"
        r"|fifty|sixty|\d{2,}"
        r"|loads of|the (whole|lot)|a (whole )?(box|packet|bottle)|too many)\b.{0,30}\b(pills?|tablets?|paracetamol"
        r"|ibuprofen|capsules?|aspirin|painkillers|of them)\b"
    ),
    "fit that does not stop": re.compile(
        r"\b(fit|fitting|seizure|jerking|shaking)('?s| is| has)?\b.{0,40}\b(not stopp\w+|won'?t stop|hasn'?t stopped|(still"
        r"|keeps) going|(five|six|seven"
        r"|eight|nine|ten|\d{1,2}) minutes)"
    ),
    "not breathing": re.compile(
        r"\b(he|she|they|baby|mum|dad|who)('?s| is| has| isn'?t)? (not|stopped|isn'?t)? ?(breathing at all|not breathing)\b"
    ),
}


def features(text: str) -> list[float]:
    """One number a flag: alarms 0 or 1, denied ones 0; reassurances 0, 1 or 2; then how many alarms there are."""
    text = _plain(text)
    alarms = [float(_present(pattern, text)) for pattern in _ALARMS.values()]
    tones = [float(min(2, len(pattern.findall(text)))) for pattern in _REASSURANCES.values()]
    return [*alarms, *tones, min(4.0, sum(alarms))]


def alarms(text: str) -> list[str]:
    """The alarms a message raises, for the trace."""
    return [name for name, pattern in _ALARMS.items() if _present(pattern, _plain(text))]


def floor(text: str) -> str | None:
    """The rule by which this is an emergency whatever any model says; None when no rule applies.

    A general question says nothing about the sentences around it: they may be what someone wrapped an emergency in.
    """
    text = " ".join(s for s in re.split(r"(?<=[.!?])\s+", _plain(text)) if not _GENERAL.search(s))
    found = {name for name, pattern in _ALARMS.items() if _present(pattern, text)}
    for rule, groups in FLOOR.items():
        if all(found & set(group) for group in groups) and len(found & {name for group in groups for name in group}) >= len(
            groups
        ):
            return rule
    return next((rule for rule, pattern in _PLAIN.items() if pattern.search(text)), None)


def _present(pattern: re.Pattern[str], text: str) -> bool:
    return any(not _DENIED.search(text[max(0, match.start() - 30) : match.start()]) for match in pattern.finditer(text))


def _plain(text: str) -> str:
    return " ".join(text.lower().replace("’", "'").split())
