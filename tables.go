package main

import (
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// The CSV files that hold all of a database: their columns, what may stand in them, and how their
// rows go into the tables and out again. seed.go loads them, export.go writes them.
//
// users.csv, urls.csv and events.csv have the columns of the API's rows. What these cannot hold is
// in links.csv (when a link ends, that it was deleted, its counts) and clicks.csv (the figures per
// day). The last two are written only when there is something to say, and need not be there to be
// loaded. What was exported and loaded into an empty database answers every question as before.

const (
	// maxLoadedID leaves the sequences, which go on from the largest id, room to count.
	maxLoadedID = 1 << 62

	// maxUploadedID is for files of strangers: the sequence then stays below maxID for good.
	maxUploadedID = maxID / 2
)

// csvTable is one of the files, and how it goes into the database and out again.
type csvTable struct {
	name     string // of the file, without .csv
	columns  []column
	optional bool // may be missing, and is not written when it would be empty

	// insert adds the rows of ROWS, which stands for a chunk of the file with its columns, those of
	// derive, and n, the number of the row in the chunk.
	insert string
	// derive makes of a row's fields those of the columns in derived, for insert.
	derived []string
	derive  func(fields []string) []string
	// same is the condition under which the row of the table with a row's id is that row. Rows of
	// which insert adds nothing are held to it.
	same string
	// taken says what is wrong with a row that is not the same.
	taken rowError

	// query selects all rows for an export, and record reads one of them as the file has it. Nil
	// reads the columns as text.
	query  string
	record func(rows *sql.Rows) ([]string, error)
}

// column is a column of a file.
type column struct {
	name     string
	cast     string                             // its SQL type
	check    func(field string) (string, error) // returns the field as it is to be stored
	nullable bool                               // an empty field is NULL
	unique   *keySet                            // where the values are noted, if none may return
	refers   *keySet                            // where the value must stand
}

// textColumn is a column whose fields are stored as they are, if check finds nothing wrong.
func textColumn(name, cast string, check func(string) error) column {
	return column{name: name, cast: cast, check: func(field string) (string, error) {
		return field, check(field)
	}}
}

// idColumn is a column of ids from 1 to max.
func idColumn(name string, max int64) column {
	return textColumn(name, "bigint", func(s string) error { return checkNumber(s, 1, max) })
}

// reference is a column of ids or codes that must stand in keys.
func reference(c column, keys *keySet, nullable bool) column {
	c.refers = keys
	c.nullable = nullable
	return c
}

// timeColumn is a column of times.
func timeColumn(name string) column { return textColumn(name, "timestamp", checkCSVTime) }

// codeColumn is a column of short codes.
func codeColumn() column { return textColumn("short_code", "text", checkCode) }

// csvTables are the files in the order that their references need. Their sets of keys belong to one
// load or export.
func csvTables() []csvTable {
	users := newIDSet("users.csv")
	links := newIDSet("urls.csv")
	codes := newCodeSet("urls.csv")
	return []csvTable{
		usersTable(users, maxLoadedID),
		urlsTable(users, links, codes),
		linksTable(codes),
		clicksTable(codes),
		eventsTable(users, links),
	}
}

// usersTable is users.csv with ids up to maxGiven, which are noted in users. A user is the same as
// long as its name or its e-mail is: both can be changed.
func usersTable(users *keySet, maxGiven int64) csvTable {
	id := idColumn("id", maxGiven)
	id.unique = users
	return csvTable{
		name: "users",
		columns: []column{
			id,
			textColumn("username", "text", checkName),
			textColumn("email", "text", checkEmail),
			timeColumn("created_at"),
		},
		insert: `INSERT INTO users (id, username, email, created_at)
			SELECT id, username, email, created_at FROM ROWS ON CONFLICT DO NOTHING`,
		same: `users.id = row.id AND users.created_at = row.created_at
			AND (users.username = row.username OR users.email = row.email)`,
		taken: rowError{column: "id", reason: "the database has another user with this id"},
		query: `SELECT id::text, username, email, created_at::text FROM users
			ORDER BY users.id`,
		record: func(rows *sql.Rows) ([]string, error) {
			record, err := scanTexts(rows)
			if err == nil {
				users.add(record[0])
			}
			return record, err
		},
	}
}

// urlsTable is urls.csv. A link is the same as long as its id and its code are.
//
// Targets are held to the form that the API asks for, but not to its policy: a link may lead into a
// private network or to this service itself. That policy keeps strangers from making such links,
// and whoever loads files has the database's password. An export must load wherever it came from,
// also from a hop with ALLOW_PRIVATE or another BASE_URL.
func urlsTable(users, links, codes *keySet) csvTable {
	form := targetRules{allowPrivate: true}
	id := idColumn("id", maxLoadedID)
	id.unique = links
	code := codeColumn()
	code.unique = codes
	return csvTable{
		name: "urls",
		columns: []column{
			id,
			reference(idColumn("user_id", maxLoadedID), users, true),
			code,
			{name: "original_url", cast: "text", check: form.check},
			{name: "title", cast: "text", check: readTitle, nullable: true},
			textColumn("is_active", "boolean", checkCSVBool),
			timeColumn("created_at"),
			timeColumn("updated_at"),
		},
		insert: `INSERT INTO urls (id, user_id, short_code, original_url, title, is_active,
				created_at, updated_at)
			SELECT id, user_id, short_code, original_url, title, is_active, created_at, updated_at
			FROM ROWS ON CONFLICT DO NOTHING`,
		same: `urls.id = row.id AND urls.short_code = row.short_code`,
		taken: rowError{column: "short_code",
			reason: "the database has another link with this id or this code"},
		// A deleted link must not come back to life for who reads this file alone.
		query: `SELECT id::text, COALESCE(user_id::text, ''), short_code, original_url,
				COALESCE(title, ''),
				CASE WHEN is_active AND deleted_at IS NULL THEN 'True' ELSE 'False' END,
				created_at::text, updated_at::text
			FROM urls ORDER BY urls.id`,
	}
}

// eventsTable is events.csv. Clicks that hop counted are stored small and written whole, as readers
// see them. A click that reads exactly as it would if it were stored small is stored small again,
// if its day has figures: only clicks that are counted are stored small.
func eventsTable(users, links *keySet) csvTable {
	id := idColumn("id", maxLoadedID)
	id.unique = newIDSet("events.csv")
	return csvTable{
		name: "events",
		columns: []column{
			id,
			reference(idColumn("url_id", maxLoadedID), links, false),
			reference(idColumn("user_id", maxLoadedID), users, true),
			textColumn("event_type", "text", checkName),
			timeColumn("timestamp"),
			textColumn("details", "json", checkDetails),
		},
		derived: []string{"click_code", "click_url", "click_details"},
		derive: func(fields []string) []string {
			if fields[3] != "click" {
				return []string{"", "", ""}
			}
			return smallClick(fields[5])
		},
		insert: `WITH row AS MATERIALIZED (
			    SELECT *, CASE WHEN click_code <> '' THEN (
			        SELECT urls.user_id IS NOT DISTINCT FROM row.user_id FROM urls
			        WHERE urls.id = row.url_id AND urls.short_code = click_code
			              AND urls.original_url = click_url
			              AND EXISTS (SELECT 1 FROM clicks_daily AS d
			                          WHERE d.url_id = urls.id AND d.day = timestamp::date)
			    ) END AS counted
			    FROM ROWS
			)
			INSERT INTO events (id, url_id, user_id, event_type, timestamp, details)
			SELECT id, url_id, CASE WHEN counted THEN NULL ELSE user_id END, event_type, timestamp,
			       CASE WHEN counted THEN click_details::json ELSE details END
			FROM row ON CONFLICT DO NOTHING`,
		same: `events.id = row.id AND events.url_id = row.url_id
			AND events.event_type = row.event_type AND events.timestamp = row.timestamp`,
		taken: rowError{column: "id", reason: "the database has another event with this id"},
		query: `SELECT ` + eventCols + ` FROM events
			LEFT JOIN urls ON urls.id = events.url_id AND event_type = 'click' ORDER BY events.id`,
		record: func(rows *sql.Rows) ([]string, error) { return eventRecord(rows, users) },
	}
}

// justLoaded is true of the links that this transaction made: PostgreSQL keeps in xmin which one
// wrote a row. Links that were there before keep their ends, counts and figures.
const justLoaded = `urls.xmin = pg_current_xact_id()::xid`

// linksTable is links.csv: what urls.csv cannot say of a link.
func linksTable(codes *keySet) csvTable {
	code := codeColumn()
	code.unique = newCodeSet("links.csv")
	code.refers = codes
	expires := timeColumn("expires_at")
	expires.nullable = true
	deleted := timeColumn("deleted_at")
	deleted.nullable = true
	lastClick := timeColumn("last_clicked_at")
	lastClick.nullable = true
	return csvTable{
		name:     "links",
		optional: true,
		columns:  []column{code, expires, deleted, countColumn("click_count"), lastClick},
		insert: `UPDATE urls SET expires_at = row.expires_at, deleted_at = row.deleted_at,
				click_count = row.click_count, last_clicked_at = row.last_clicked_at
			FROM ROWS WHERE urls.short_code = row.short_code AND ` + justLoaded,
		query: `SELECT short_code, COALESCE(expires_at::text, ''), COALESCE(deleted_at::text, ''),
				click_count::text, COALESCE(last_clicked_at::text, '')
			FROM urls
			WHERE expires_at IS NOT NULL OR deleted_at IS NOT NULL OR click_count <> 0
			      OR last_clicked_at IS NOT NULL
			ORDER BY urls.id`,
	}
}

// clicksTable is clicks.csv: the clicks of a link on one day from one referrer. Where they were
// counted, some of their rows may have been removed: hop verify is told not to miss them.
func clicksTable(codes *keySet) csvTable {
	return csvTable{
		name:     "clicks",
		optional: true,
		columns: []column{
			reference(codeColumn(), codes, false),
			textColumn("day", "date", checkCSVDay),
			textColumn("referrer", "text", checkText),
			countColumn("clicks"),
			countColumn("bots"),
		},
		insert: `WITH row AS MATERIALIZED (
			    SELECT * FROM ROWS
			), noted AS (
			    INSERT INTO hop_meta (key, value)
			    SELECT DISTINCT '` + rowless + `' || day, '' FROM row ON CONFLICT DO NOTHING
			)
			INSERT INTO clicks_daily (url_id, day, referrer, clicks, bots)
			SELECT urls.id, day, referrer, clicks, bots
			FROM row JOIN urls ON urls.short_code = row.short_code AND ` + justLoaded,
		query: `SELECT short_code, day::text, referrer, clicks::text, bots::text
			FROM clicks_daily JOIN urls ON urls.id = url_id ORDER BY url_id, day, referrer`,
	}
}

// countColumn is a column of counts.
func countColumn(name string) column {
	return textColumn(name, "bigint", func(s string) error { return checkNumber(s, 0, maxID) })
}

// smallClick takes a click's details apart. When they are those that whole makes of a counted
// click, it returns the code and the target that its link must have for them, and the details as
// they are stored; otherwise three empty strings.
func smallClick(details string) []string {
	none := []string{"", "", ""}
	var click struct {
		Code     string `json:"short_code"`
		URL      string `json:"original_url"`
		Referrer string `json:"referrer"`
		Bot      bool   `json:"bot"`
	}
	if json.Unmarshal([]byte(details), &click) != nil {
		return none
	}
	small := clickDetails(click.Referrer, click.Bot)
	read := storedEvent{
		event: &event{EventType: "click", Details: json.RawMessage(small)},
		code:  sql.NullString{String: click.Code},
		url:   sql.NullString{String: click.URL},
	}
	if !json.Valid([]byte(small)) || string(read.whole().Details) != details {
		return none
	}
	return []string{click.Code, click.URL, small}
}

// ---- what fields may say ----

// checkNumber returns why s is no number from low to high, written plainly, or nil.
func checkNumber(s string, low, high int64) error {
	n, err := strconv.ParseInt(s, 10, 64)
	if err == nil && low <= n && n <= high && strconv.FormatInt(n, 10) == s {
		return nil
	}
	return fmt.Errorf("must be an integer from %d to %d, not %s", low, high, excerpt(s))
}

// checkCSVTime returns why s is no time as the files have it, or nil.
func checkCSVTime(s string) error {
	t, err := time.Parse(csvTime, s)
	if err != nil || t.Year() == 0 || t.Format(csvTime) != s {
		return fmt.Errorf("must be a time like 2026-01-31 12:00:00, not %s", excerpt(s))
	}
	return nil
}

// checkCSVDay returns why s is no day as the files have it, or nil.
func checkCSVDay(s string) error {
	t, err := time.Parse(time.DateOnly, s)
	if err != nil || t.Year() == 0 {
		return fmt.Errorf("must be a day like 2026-01-31, not %s", excerpt(s))
	}
	return nil
}

// checkCSVBool returns why s is no truth value as the files have it, or nil.
func checkCSVBool(s string) error {
	if s == "True" || s == "False" {
		return nil
	}
	return fmt.Errorf("must be True or False, not %s", excerpt(s))
}

// readTitle returns a title as it is stored: without blanks at its ends.
func readTitle(s string) (string, error) {
	title := cleanText(s)
	return title, checkText(title)
}

// checkDetails returns why s cannot be the details of an event, or nil.
func checkDetails(s string) error {
	switch {
	case !strings.HasPrefix(s, "{"):
		return fmt.Errorf("must be a JSON object, not %s", excerpt(s))
	case !utf8.ValidString(s):
		return errors.New("must be valid UTF-8")
	case !json.Valid([]byte(s)):
		return errors.New("must be one JSON value")
	}
	return nil
}

// keySet is a set of the values of a column: ids, of which it keeps one bit each where they are
// dense, as ids are, or codes.
type keySet struct {
	file  string // where the column stands
	ids   map[int64]uint64
	codes map[string]bool
}

// newIDSet returns an empty set of ids.
func newIDSet(file string) *keySet { return &keySet{file: file, ids: map[int64]uint64{}} }

// newCodeSet returns an empty set of codes.
func newCodeSet(file string) *keySet { return &keySet{file: file, codes: map[string]bool{}} }

// has says whether key is in the set.
func (s *keySet) has(key string) bool {
	if s.codes != nil {
		return s.codes[key]
	}
	id, bit := idBit(key)
	return s.ids[id]&bit != 0
}

// add puts key into the set. It says whether it was not there.
func (s *keySet) add(key string) bool {
	if s.has(key) {
		return false
	}
	if s.codes != nil {
		s.codes[key] = true
		return true
	}
	id, bit := idBit(key)
	s.ids[id] |= bit
	return true
}

// idBit is where a set keeps an id, which has been checked to be one.
func idBit(key string) (word int64, bit uint64) {
	id, _ := strconv.ParseInt(key, 10, 64)
	return id / 64, 1 << (id % 64)
}

// scanTexts reads a row of texts.
func scanTexts(rows *sql.Rows) ([]string, error) {
	names, err := rows.Columns()
	if err != nil {
		return nil, err
	}
	fields := make([]string, len(names))
	dest := make([]any, len(names))
	for i := range fields {
		dest[i] = &fields[i]
	}
	return fields, rows.Scan(dest...)
}

// eventRecord reads a row of eventCols as events.csv has it. An event may still name a user who was
// deleted while it was written; users says who is left.
func eventRecord(rows *sql.Rows, users *keySet) ([]string, error) {
	var stored storedEvent
	if err := rows.Scan(eventDest(&stored)...); err != nil {
		return nil, err
	}
	e := stored.whole()
	userID := ""
	if e.UserID != nil {
		userID = strconv.FormatInt(*e.UserID, 10)
	}
	if !users.has(userID) {
		userID = ""
	}
	return []string{
		strconv.FormatInt(e.ID, 10),
		strconv.FormatInt(e.URLID, 10),
		userID,
		e.EventType,
		e.Timestamp.Format(csvTime),
		string(e.Details),
	}, nil
}
