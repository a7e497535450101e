package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// The nouns of hop: what its files hand to each other, and the errors they all speak in. This file
// comes first and knows none of the others.

// The errors of the store and the cache. Handlers turn them into answers (failures in handlers.go).
var (
	errNotFound    = errors.New("not found")
	errNoUser      = errors.New("unknown user")
	errNoLink      = errors.New("unknown link")
	errCodeTaken   = errors.New("code taken")
	errUserExists  = errors.New("user exists")
	errKeyReused   = errors.New("idempotency key used for another link")
	errChanged     = errors.New("changed meanwhile")
	errBeyond      = errors.New("a page beyond those that are walked to")
	errUnavailable = errors.New("database unavailable") // down, hung or too busy: ask again
	errOverloaded  = errors.New("overloaded")           // too many wait already: ask again later
)

// The two ways hop writes a time. Both are UTC in whole seconds, without a zone.
const (
	wireTime = "2006-01-02T15:04:05" // in JSON
	csvTime  = "2006-01-02 15:04:05" // in CSV files and in SQL
)

// stamp is a time as the API writes it.
type stamp struct{ time.Time }

// MarshalJSON writes the time in wireTime's form.
func (t stamp) MarshalJSON() ([]byte, error) {
	return t.AppendFormat(nil, `"`+wireTime+`"`), nil
}

// Scan takes what the database driver gives for a timestamp column.
func (t *stamp) Scan(v any) error {
	read, ok := v.(time.Time)
	if !ok {
		return fmt.Errorf("cannot read %T as a time", v)
	}
	t.Time = read
	return nil
}

// user is a row of the table users.
type user struct {
	ID        int64  `json:"id"`
	Username  string `json:"username"`
	Email     string `json:"email"`
	CreatedAt stamp  `json:"created_at"`
}

// link is a row of the table urls, without its counts.
type link struct {
	ID          int64   `json:"id"`
	UserID      *int64  `json:"user_id"`
	ShortCode   string  `json:"short_code"`
	OriginalURL string  `json:"original_url"`
	Title       *string `json:"title"`
	IsActive    bool    `json:"is_active"`
	CreatedAt   stamp   `json:"created_at"`
	UpdatedAt   stamp   `json:"updated_at"`
	ExpiresAt   *stamp  `json:"expires_at,omitempty"`
}

// event is something that happened to a link: a row of the table events.
type event struct {
	ID        int64           `json:"id"`
	URLID     int64           `json:"url_id"`
	UserID    *int64          `json:"user_id"`
	EventType string          `json:"event_type"`
	Timestamp stamp           `json:"timestamp"`
	Details   json.RawMessage `json:"details"`
}

// target is what a code leads to. The zero target says that the code leads nowhere: it is unknown,
// or its link is inactive, expired or deleted.
type target struct {
	id       int64    // of the link
	location []string // one URL in ASCII, kept as http.Header wants it: a redirect allocates nothing
	expires  int64    // unix seconds; 0 is never
}

// live says whether the target may be served at unix second now.
func (t target) live(now int64) bool {
	return t.id != 0 && (t.expires == 0 || now < t.expires)
}

// codeTarget is a target and the code that leads to it.
type codeTarget struct {
	code string
	target
}

// newLink is a link to be made. Zero fields are absent.
type newLink struct {
	userID   int64
	code     string // "" asks for a random one
	custom   bool   // the code was chosen by the client: somebody may have asked for it before
	keyed    bool   // the client may ask for the same link again (idempotency.go)
	url      string
	title    string
	inactive bool
	expires  time.Time
}

// createResult is what became of a newLink: a link, or the error that says why there is none.
type createResult struct {
	link    link
	err     error
	pending bool // Redis could not be told; other replicas learn of it from their next poll
}

// linkChange is what a PUT or PATCH sets. A nil field stays as it is.
type linkChange struct {
	url     *string
	title   *string // "" clears it
	active  *bool
	expires *time.Time // the zero time clears it
}

// linkFilter chooses links for a list. Nil and empty fields choose all.
type linkFilter struct {
	userID      *int64
	active      *bool
	code        string
	originalURL string
	search      string   // part of the code, the target or the title
	sort        linkSort // the order of the list
}

// linkSort is the order of a list of links.
type linkSort int

const (
	byID     linkSort = iota // oldest first
	byNewest                 // newest first
	byClicks                 // most clicks first
)

// eventFilter chooses events for a list. Nil and empty fields choose all.
type eventFilter struct {
	urlID     *int64
	userID    *int64
	eventType string
}

// page is a part of a list: limit rows after skipping offset rows, all with ids beyond after.
type page struct {
	limit  int
	offset int
	after  int64
	beyond bool // further than pages reach: if it has a row, the list is errBeyond
}

// countedLink is a link with how often people followed it.
type countedLink struct {
	link
	ClickCount int64
}

// linkStats is a link with its figures.
type linkStats struct {
	link
	ClickCount    int64       `json:"click_count"`
	LastClickedAt *stamp      `json:"last_clicked_at"`
	BotClicks     int64       `json:"bot_clicks"`
	ClicksPerDay  []dayCount  `json:"clicks_per_day"` // newest day first, at most 366
	TopReferrers  []hostCount `json:"top_referrers"`  // at most ten
}

// dayCount is how many people clicked on one UTC day.
type dayCount struct {
	Day    string `json:"day"`
	Clicks int64  `json:"clicks"`
}

// hostCount is how many people came from one host.
type hostCount struct {
	Referrer string `json:"referrer"`
	Clicks   int64  `json:"clicks"`
}

// clickSum is a number of equal clicks: one link, one second, one kind, one referrer.
type clickSum struct {
	linkID   int64
	second   int64 // unix
	count    int64
	bot      bool
	noEvent  bool   // counted, but without a row in events
	referrer string // host, or ""
}

// clickBatch is a run of one journal's clicks, to be counted in one transaction. The journal's
// clicks are numbered; the batch holds those from number from up to, but not including, number to.
type clickBatch struct {
	journal string // random id of the journal
	from    int64
	to      int64
	sums    []clickSum
}

// jsonText is v as compact JSON, with <, > and & as they are. All types of hop can be encoded.
func jsonText(v any) string {
	var text bytes.Buffer
	writeJSONText(&text, v)
	return text.String()
}

// writeJSONText writes jsonText(v) behind text.
func writeJSONText(text *bytes.Buffer, v any) {
	encoder := json.NewEncoder(text)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(v); err != nil {
		panic(err)
	}
	text.Truncate(text.Len() - len("\n"))
}

// ---- lists ----

// maxListed is how many bytes of JSON the rows of one answer may have. 1,000 usual links have
// 300 KB, but so many events can have 16 MB, and every byte stays in memory until the client has
// read it. Such a page ends early, and the next one begins where it ended.
const maxListed = 2 << 20

// listed is a page of a list, and whether there are rows behind it.
type listed[T listable] struct {
	rows []T
	more bool
}

// lastID is where the next page goes on, if rows are in the order of ids.
func (l listed[T]) lastID() int64 { return l.rows[len(l.rows)-1].rowID() }

// listable is a row of a list. It becomes at most weight bytes of JSON, with a comma.
type listable interface {
	rowID() int64
	weight() int
}

func (u user) rowID() int64  { return u.ID }
func (l link) rowID() int64  { return l.ID }
func (e event) rowID() int64 { return e.ID }

// rowFrame is more than what a row's names, numbers, times and quotes take.
const rowFrame = 320

// weight of a user.
func (u user) weight() int { return rowFrame + jsonLength(u.Username) + jsonLength(u.Email) }

// weight of a link.
func (l link) weight() int {
	n := rowFrame + jsonLength(l.ShortCode) + jsonLength(l.OriginalURL)
	if l.Title != nil {
		n += jsonLength(*l.Title)
	}
	return n
}

// weight of an event. Details are JSON already.
func (e event) weight() int { return rowFrame + jsonLength(e.EventType) + len(e.Details) }

// jsonLength is at least as many bytes as s takes within the quotes of a JSON string.
func jsonLength(s string) int {
	const escape = len(`\u2028`)
	n := len(s)
	for i := range len(s) {
		switch c := s[i]; {
		case c == '"' || c == '\\':
			n++
		case c < ' ' || c == 0xe2: // a control character, or the first byte of U+2028 and others
			n += escape - 1
		}
	}
	return n
}
