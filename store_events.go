package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"strconv"
	"strings"
)

// What hop asks PostgreSQL about events.

// createEvent logs what a client reports of a link. userID 0 is nobody. The locks keep link and
// user until the event stands.
func (s *Store) createEvent(ctx context.Context, urlID, userID int64,
	eventType, details string) (event, error) {

	var e event
	err := s.pg.requests.inTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		var found int
		err := txQueryOne(ctx, tx, errNoLink, []any{&found}, `
			SELECT 1 FROM urls WHERE id = $1 AND deleted_at IS NULL FOR KEY SHARE`, urlID)
		if err != nil {
			return err
		}
		if userID != 0 {
			err = txQueryOne(ctx, tx, errNoUser, []any{&found},
				`SELECT 1 FROM users WHERE id = $1 FOR KEY SHARE`, userID)
			if err != nil {
				return err
			}
		}
		return txQueryOne(ctx, tx, errNotFound, eventDest(&storedEvent{event: &e}), `
			INSERT INTO events (url_id, user_id, event_type, timestamp, details)
			VALUES ($1, NULLIF($2::bigint, 0), $3, `+utcNow+`, $4)
			RETURNING id, url_id, user_id, event_type, timestamp, details, NULL, NULL, NULL`,
			urlID, userID, eventType, details)
	})
	return e, err
}

// storedEvent is a row of events beside what the row of its link adds to a counted click.
type storedEvent struct {
	*event
	owner *int64
	code  sql.NullString
	url   sql.NullString
}

// eventDest names the places for a row of eventCols.
func eventDest(e *storedEvent) []any {
	if e.event == nil {
		e.event = &event{}
	}
	return []any{
		&e.ID, &e.URLID, &e.UserID, &e.EventType, &e.Timestamp,
		&e.Details, &e.owner, &e.code, &e.url,
	}
}

// eventCols are an event's columns, and for a click its link's.
const eventCols = `events.id, events.url_id, events.user_id, event_type, timestamp, details,
	urls.user_id, urls.short_code, urls.original_url`

// whole makes of a click that hop counted, which is stored small, an event like all others.
func (e storedEvent) whole() event {
	if e.EventType != "click" || e.Details[0] == '{' {
		return *e.event
	}
	details := struct {
		Code     string `json:"short_code"`
		URL      string `json:"original_url"`
		Referrer string `json:"referrer,omitempty"`
		Bot      bool   `json:"bot,omitempty"`
	}{Code: e.code.String, URL: e.url.String}
	details.Referrer, details.Bot = readClickDetails(e.Details)
	e.UserID = e.owner
	e.Details = json.RawMessage(jsonText(details))
	return *e.event
}

// clickDetails is what the details column holds for a counted click: false for most, true for a
// bot, or "referrer", or ["referrer", true]. It is never NULL, which the first release cannot read:
// it would take PostgreSQL for broken, beside this one or after a roll-back.
func clickDetails(referrer string, bot bool) string {
	switch {
	case referrer == "":
		return strconv.FormatBool(bot)
	case bot:
		return `["` + referrer + `",true]`
	}
	return `"` + referrer + `"`
}

// readClickDetails reads what clickDetails wrote.
func readClickDetails(stored json.RawMessage) (referrer string, bot bool) {
	text := string(stored)
	bot = strings.Contains(text, "true")
	if _, rest, quoted := strings.Cut(text, `"`); quoted {
		referrer, _, _ = strings.Cut(rest, `"`)
		bot = strings.HasSuffix(text, `",true]`)
	}
	return referrer, bot
}

// weight of an event that is still to be made whole: see whole.
func (e storedEvent) weight() int {
	const clickNames = len(`{"short_code":"","original_url":"","referrer":"","bot":true}`)
	return e.event.weight() + clickNames + jsonLength(e.code.String) + jsonLength(e.url.String)
}

// listEvents returns one page of events in id order.
func (s *Store) listEvents(ctx context.Context, f eventFilter, p page) (listed[event], error) {
	var stored listed[storedEvent]
	var err error
	if f.userID == nil {
		q := listQuery{table: "events"}
		if f.urlID != nil {
			q.where("url_id = ?", *f.urlID)
		}
		if f.eventType != "" {
			q.where("event_type = ?", f.eventType)
		}
		stored, err = listEventRows(ctx, s.pg.readers, q, p)
	} else {
		stored, err = s.eventsOfUser(ctx, f, p)
	}
	if err != nil {
		return listed[event]{}, err
	}
	events := make([]event, len(stored.rows))
	for i, e := range stored.rows {
		events[i] = e.whole()
	}
	return listed[event]{events, stored.more}, nil
}

// listEventRows runs q for one page of events, and then joins what counted clicks lack.
func listEventRows(ctx context.Context, p *pool, q listQuery, part page) (listed[storedEvent],
	error) {

	q.columns = eventCols
	q.join = `LEFT JOIN urls ON urls.id = events.url_id AND event_type = 'click'`
	return list(ctx, p, eventDest, q, part)
}

// eventsOfUser lists the events of one user: those that name the user, and the counted clicks of
// the user's links, which do not. It looks at growing ranges of ids until it has a page: a user of
// a thousand busy links must not have all their clicks read for the first page of them.
func (s *Store) eventsOfUser(ctx context.Context, f eventFilter, p page) (listed[storedEvent],
	error) {

	const firstRange = 50_000 // ids: some 50 ms if all of them are the user's
	var linkID int64          // 0: any
	if f.urlID != nil {
		linkID = *f.urlID
	}
	last, err := queryOne(ctx, s.pg.readers, func(n *int64) []any { return []any{n} },
		`SELECT COALESCE(max(id), 0) FROM events`)
	if err != nil {
		return listed[storedEvent]{}, err
	}
	wanted := p.offset + p.limit + 1
	for width := int64(firstRange); ; width *= 8 {
		q := listQuery{
			table: userEvents,
			args:  []any{*f.userID, p.after, p.after + width, wanted, f.eventType, linkID},
		}
		found, err := listEventRows(ctx, s.pg.readers, q, p)
		if err != nil || found.more || p.after+width >= last {
			return found, err
		}
	}
}

// userEvents is the table of a user's events: of user $1, with ids beyond $2 up to $3, at most $4
// of each kind, of type $5 (empty: any) and of link $6 (0: any).
const userEvents = `(
	(SELECT * FROM events
	 WHERE user_id = $1 AND id > $2 AND id <= $3
	       AND ($5 = '' OR event_type = $5) AND ($6::bigint = 0 OR url_id = $6::bigint)
	 ORDER BY id LIMIT $4)
	UNION ALL
	(SELECT click.* FROM urls AS own CROSS JOIN LATERAL (
	     SELECT * FROM events
	     WHERE url_id = own.id AND id > $2 AND id <= $3 AND event_type = 'click'
	           AND user_id IS NULL AND json_typeof(details) <> 'object'
	     ORDER BY id LIMIT $4) AS click
	 WHERE own.user_id = $1 AND $5 IN ('', 'click')
	       AND ($6::bigint = 0 OR own.id = $6::bigint)
	 ORDER BY click.id LIMIT $4)
) AS events`
