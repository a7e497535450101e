package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// What hop asks PostgreSQL about links: making, changing, listing them, and their figures.

// createLinks makes all of links that it can and logs a created event for each. Their codes must
// differ from each other. Many are made in one statement and so one commit; a link that PostgreSQL
// cannot store fails alone: the others are then made one by one, until the database has no time.
func (s *Store) createLinks(ctx context.Context, links []newLink) ([]createResult, error) {
	if len(links) > 1 {
		results, err := s.insertLinks(ctx, links)
		if err == nil || isBusy(err) {
			return results, err
		}
	}
	results := make([]createResult, len(links))
	var busy error
	for i, l := range links {
		if busy != nil {
			results[i].err = busy
			continue
		}
		results[i] = s.insertLink(ctx, l)
		if isBusy(results[i].err) {
			busy = results[i].err
		}
	}
	return results, nil
}

// isBusy says whether err is about the database, and not about what it was asked.
func isBusy(err error) bool {
	return errors.Is(err, errUnavailable) || errors.Is(err, errOverloaded)
}

// insertLink makes one link. PostgreSQL plans its statement in half the time that the one for many
// takes, which is 0.3 ms of a create that is alone. When a link has a code that is taken and a user
// that is unknown, here the code is blamed, and in company the user.
func (s *Store) insertLink(ctx context.Context, l newLink) createResult {
	type made struct {
		id      int64
		created stamp
	}
	dest := func(m *made) []any { return []any{&m.id, &m.created} }
	row := l.row(0)
	answer, err := insertOnce(ctx, s.pg.requests, dest, `
		WITH made AS (
		    INSERT INTO urls (user_id, short_code, original_url, title, is_active, expires_at,
		                      created_at, updated_at, changed)
		    VALUES ($1, $2, $3, $4, $5, $6, `+utcNow+`, `+utcNow+`,
		            CASE WHEN $7 THEN pg_current_xact_id() END)
		    ON CONFLICT (short_code) DO NOTHING
		    RETURNING id, user_id, created_at
		)
		INSERT INTO events (url_id, user_id, event_type, timestamp, details)
		SELECT id, user_id, 'created', created_at, $8::json FROM made
		RETURNING url_id, timestamp`,
		row.UserID, row.Code, row.URL, row.Title, row.Active, row.Expires, row.Custom,
		string(row.Details))
	switch {
	case pq.As(err, pqerror.ForeignKeyViolation) != nil:
		return createResult{err: errNoUser}
	case err != nil:
		return createResult{err: err}
	case len(answer) == 0:
		return createResult{err: errCodeTaken}
	}
	return createResult{link: l.made(answer[0].id, answer[0].created)}
}

// linkRow is a link to be made as the INSERT reads it.
type linkRow struct {
	Position int             `json:"n"`
	UserID   *int64          `json:"user_id"`
	Code     string          `json:"short_code"`
	URL      string          `json:"original_url"`
	Title    *string         `json:"title"`
	Active   bool            `json:"is_active"`
	Expires  *string         `json:"expires_at"`
	Custom   bool            `json:"custom"` // somebody may have asked for the code before
	Details  json.RawMessage `json:"details"`
}

// row is the link as both INSERTs send it.
func (l newLink) row(position int) linkRow {
	row := linkRow{
		Position: position,
		Code:     l.code,
		URL:      l.url,
		Active:   !l.inactive,
		Custom:   l.custom,
		Details:  createdDetails(l.code, l.url),
	}
	if l.userID != 0 {
		row.UserID = &l.userID
	}
	if l.title != "" {
		row.Title = &l.title
	}
	if !l.expires.IsZero() {
		row.Expires = new(l.expires.Format(csvTime))
	}
	return row
}

// createdDetails are the details of a created event.
func createdDetails(code, url string) json.RawMessage {
	return json.RawMessage(jsonText(struct {
		Code string `json:"short_code"`
		URL  string `json:"original_url"`
	}{code, url}))
}

// insertLinks makes all of links or, with an error, none. The rows travel as one JSON parameter.
func (s *Store) insertLinks(ctx context.Context, links []newLink) ([]createResult, error) {
	rows := make([]linkRow, len(links))
	for i, l := range links {
		rows[i] = l.row(i)
	}
	type made struct {
		position int
		known    bool
		id       int64
		created  stamp
	}
	dest := func(m *made) []any { return []any{&m.position, &m.known, &m.id, &m.created} }
	conns := s.pg.requests
	if len(links) > batchSize {
		conns = s.pg.bulk
	}
	answers, err := insertOnce(ctx, conns, dest, `
		WITH item AS (
		    SELECT *, user_id IS NULL
		           OR EXISTS (SELECT 1 FROM users WHERE users.id = i.user_id) AS known
		    FROM json_to_recordset($1::json) AS i (n int, user_id bigint, short_code text,
		         original_url text, title text, is_active boolean, expires_at timestamp,
		         custom boolean, details json)
		), made AS (
		    INSERT INTO urls (user_id, short_code, original_url, title, is_active, expires_at,
		                      created_at, updated_at, changed)
		    SELECT user_id, short_code, original_url, title, is_active, expires_at,
		           `+utcNow+`, `+utcNow+`, CASE WHEN custom THEN pg_current_xact_id() END
		    FROM item WHERE known
		    ORDER BY short_code -- two batches of the same codes must not wait for each other
		    ON CONFLICT (short_code) DO NOTHING
		    RETURNING id, user_id, short_code, created_at
		), logged AS (
		    INSERT INTO events (url_id, user_id, event_type, timestamp, details)
		    SELECT made.id, made.user_id, 'created', made.created_at, item.details
		    FROM made JOIN item USING (short_code)
		)
		SELECT n, known, COALESCE(made.id, 0), COALESCE(made.created_at, `+utcNow+`)
		FROM item LEFT JOIN made USING (short_code)`, jsonText(rows))
	if err != nil {
		return nil, err
	}
	results := make([]createResult, len(links))
	for _, m := range answers {
		switch {
		case !m.known:
			results[m.position].err = errNoUser
		case m.id == 0:
			results[m.position].err = errCodeTaken
		default:
			results[m.position].link = links[m.position].made(m.id, m.created)
		}
	}
	return results, nil
}

// made is the link that creating l gave.
func (l newLink) made(id int64, created stamp) link {
	result := link{
		ID:          id,
		ShortCode:   l.code,
		OriginalURL: l.url,
		IsActive:    !l.inactive,
		CreatedAt:   created,
		UpdatedAt:   created,
	}
	if l.userID != 0 {
		result.UserID = &l.userID
	}
	if l.title != "" {
		result.Title = &l.title
	}
	if !l.expires.IsZero() {
		result.ExpiresAt = &stamp{l.expires}
	}
	return result
}

// link returns one link that was not deleted.
func (s *Store) link(ctx context.Context, id int64) (link, error) {
	return queryOne(ctx, s.pg.readers, linkDest,
		`SELECT `+linkCols+` FROM urls WHERE id = $1 AND deleted_at IS NULL`, id)
}

// linkOf returns the link of a code, also a deleted one. It is asked when a retried create finds
// its code taken.
func (s *Store) linkOf(ctx context.Context, code string) (link, error) {
	return queryOne(ctx, s.pg.requests, linkDest,
		`SELECT `+linkCols+` FROM urls WHERE short_code = $1`, code)
}

// updateLink changes a link and logs one updated event for each field whose value is another one
// now. decide is given the link as it stands, under a lock, and says what to change or why not.
func (s *Store) updateLink(ctx context.Context, id int64,
	decide func(link) (linkChange, error)) (link, error) {

	var after link
	err := s.pg.requests.inTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		var before link
		err := txQueryOne(ctx, tx, errNotFound, linkDest(&before), `
			SELECT `+linkCols+` FROM urls WHERE id = $1 AND deleted_at IS NULL FOR UPDATE`, id)
		if err != nil {
			return err
		}
		change, err := decide(before)
		if err != nil {
			return err
		}
		err = txQueryOne(ctx, tx, errNotFound, linkDest(&after), `
			UPDATE urls SET
			    original_url = COALESCE($2, original_url),
			    is_active = COALESCE($3, is_active),
			    title = CASE WHEN $4::text IS NULL THEN title ELSE NULLIF($4, '') END,
			    expires_at = CASE WHEN $5 THEN $6::timestamp ELSE expires_at END,
			    updated_at = `+nextStamp+`,
			    changed = pg_current_xact_id()
			WHERE id = $1 RETURNING `+linkCols,
			id, change.url, change.active, change.title, change.expires != nil,
			nullTime(change.expires))
		if err != nil {
			return err
		}
		return logUpdates(ctx, tx, before, after)
	})
	return after, err
}

// nullTime is t for SQL: nil and the zero time are NULL.
func nullTime(t *time.Time) sql.NullTime {
	if t == nil || t.IsZero() {
		return sql.NullTime{}
	}
	return sql.NullTime{Time: *t, Valid: true}
}

// logUpdates logs an updated event for each field in which after differs from before.
func logUpdates(ctx context.Context, tx *sql.Tx, before, after link) error {
	old := before.changeable()
	for i, field := range after.changeable() {
		if field.value == old[i].value {
			continue
		}
		_, err := txExec(ctx, tx, `
			INSERT INTO events (url_id, user_id, event_type, timestamp, details)
			VALUES ($1, $2, 'updated', `+utcNow+`, $3)`,
			after.ID, after.UserID, jsonText(struct {
				Field string `json:"field"`
				Value string `json:"new_value"`
			}{field.name, field.value}))
		if err != nil {
			return err
		}
	}
	return nil
}

// namedValue is a field of a link as an updated event holds it: as a string, whatever its type.
type namedValue struct{ name, value string }

// changeable are the fields that a PUT may change.
func (l link) changeable() []namedValue {
	var title, expires string
	if l.Title != nil {
		title = *l.Title
	}
	if l.ExpiresAt != nil {
		expires = l.ExpiresAt.Format(wireTime)
	}
	return []namedValue{
		{"original_url", l.OriginalURL},
		{"title", title},
		{"is_active", fmt.Sprint(l.IsActive)},
		{"expires_at", expires},
	}
}

// deleteLink hides a link for good, logs it, and returns the link as it was. allow may refuse, as
// decide of updateLink.
func (s *Store) deleteLink(ctx context.Context, id int64, allow func(link) error) (link, error) {
	var gone link
	err := s.pg.requests.inTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		err := txQueryOne(ctx, tx, errNotFound, linkDest(&gone), `
			SELECT `+linkCols+` FROM urls WHERE id = $1 AND deleted_at IS NULL FOR UPDATE`, id)
		if err != nil {
			return err
		}
		if err := allow(gone); err != nil {
			return err
		}
		_, err = txExec(ctx, tx, `
			WITH gone AS (
			    UPDATE urls SET deleted_at = `+utcNow+`, updated_at = `+nextStamp+`,
			                    changed = pg_current_xact_id()
			    WHERE id = $1 RETURNING id, user_id
			)
			INSERT INTO events (url_id, user_id, event_type, timestamp, details)
			SELECT id, user_id, 'deleted', `+utcNow+`, '{"reason":"user_requested"}' FROM gone`, id)
		return err
	})
	return gone, err
}

// ---- lists ----

// searchWindow is how many links a search looks through for one page: 100 ms of PostgreSQL's time.
const searchWindow = 50_000

// linkPage is a page of links. When a search stopped before it had a full page, stopped is the id
// of the last link that it looked at, and the search can go on from there.
type linkPage[T listable] struct {
	listed[T]
	stopped int64
}

// listLinks returns one page of links.
func (s *Store) listLinks(ctx context.Context, f linkFilter, p page) (linkPage[link], error) {
	return findLinks(ctx, s, linkDest, "", f, p)
}

// listCountedLinks is listLinks with how often each link was followed, as far as that is counted.
func (s *Store) listCountedLinks(ctx context.Context, f linkFilter, p page) (
	linkPage[countedLink], error) {

	return findLinks(ctx, s, countedDest, ", click_count", f, p)
}

// findLinks returns one page of links with what moreCols adds to linkCols.
func findLinks[T listable](ctx context.Context, s *Store, dest func(*T) []any, moreCols string,
	f linkFilter, p page) (linkPage[T], error) {

	q, stopped, err := s.linkQuery(ctx, f, p)
	if err != nil {
		return linkPage[T]{}, err
	}
	q.columns += moreCols
	found, err := list(ctx, s.pg.readers, dest, q, p)
	if found.more {
		stopped = 0 // there is a next page before the end of the window
	}
	return linkPage[T]{found, stopped}, err
}

// countedDest names the places for a link with its count.
func countedDest(l *countedLink) []any {
	return append(linkDest(&l.link), &l.ClickCount)
}

// linkQuery is the question for one page of links. When the search behind it looks only at a part
// of them, stopped is the id of the last one.
func (s *Store) linkQuery(ctx context.Context, f linkFilter, p page) (q listQuery, stopped int64,
	err error) {

	q = listQuery{
		columns: linkCols,
		table:   "urls",
		sort:    f.sort,
		conds:   []string{"deleted_at IS NULL"},
	}
	if f.userID != nil {
		q.where("user_id = ?", *f.userID)
	}
	if f.active != nil {
		q.where("is_active = ?", *f.active)
	}
	if f.code != "" {
		q.where("short_code = ?", f.code)
	}
	if f.originalURL != "" {
		q.where("original_url = ?", f.originalURL)
	}
	if f.search != "" || f.sort == byClicks {
		stopped, err = s.narrow(ctx, &q, f, p)
		if err != nil {
			return q, 0, err
		}
	}
	if f.search != "" {
		// Both sides by PostgreSQL's lower(), which in some locales knows ASCII only.
		q.where(`(strpos(lower(short_code), lower(?::text)) > 0
			OR strpos(lower(original_url), lower(?::text)) > 0
			OR strpos(lower(title), lower(?::text)) > 0)`, f.search)
	}
	return q, stopped, nil
}

// narrow limits q to the searchWindow links from where page p begins (by clicks: to the newest
// ones), since no index orders or finds them. It returns the last id of the window when links
// beyond it are left.
func (s *Store) narrow(ctx context.Context, q *listQuery, f linkFilter, p page) (int64, error) {
	window := *q
	window.args = append([]any(nil), q.args...)
	window.conds = append([]string(nil), q.conds...)
	window.columns = "urls.id"
	if f.sort == byClicks {
		window.sort = byNewest
		if p.after > 0 {
			q.where("id < ?", p.after) // which list heeds in the order of ids only
		}
	}
	// The one row at searchWindow: text asks for one more than limit.
	query, args := window.text(page{limit: 0, offset: searchWindow, after: p.after})
	edge, err := queryAll(ctx, s.pg.readers, func(id *int64) []any { return []any{id} }, query,
		args...)
	if err != nil || len(edge) == 0 {
		return 0, err
	}
	if window.sort == byNewest {
		q.where("id >= ?", edge[0])
	} else {
		q.where("id <= ?", edge[0])
	}
	return edge[0], nil
}

// ---- figures ----

// figureDays is how far back the figures per day and per referrer go. With at most maxReferrers
// hosts a day it bounds what one question reads: 37,000 rows, 30 ms.
const figureDays = 366

// stats returns the figures of a link that was not deleted, as far as its clicks are counted.
func (s *Store) stats(ctx context.Context, code string) (linkStats, error) {
	st, err := queryOne(ctx, s.pg.readers, statsDest, `
		SELECT `+linkCols+`, click_count, last_clicked_at, COALESCE((
		    SELECT sum(bots) FROM clicks_daily
		    WHERE url_id = urls.id AND day > `+utcToday+` - $2::int), 0)::bigint
		FROM urls WHERE short_code = $1 AND deleted_at IS NULL`, code, figureDays)
	if err != nil {
		return st, err
	}
	st.ClicksPerDay, err = queryAll(ctx, s.pg.readers, dayDest, `
		SELECT day::text, sum(clicks)::bigint FROM clicks_daily
		WHERE url_id = $1 AND clicks > 0 AND day > `+utcToday+` - $2::int
		GROUP BY day ORDER BY day DESC`, st.ID, figureDays)
	if err != nil {
		return st, err
	}
	st.TopReferrers, err = queryAll(ctx, s.pg.readers, hostDest, `
		SELECT referrer, sum(clicks)::bigint FROM clicks_daily
		WHERE url_id = $1 AND clicks > 0 AND referrer <> '' AND day > `+utcToday+` - $2::int
		GROUP BY referrer ORDER BY 2 DESC, 1 LIMIT 10`, st.ID, figureDays)
	return st, err
}

// statsDest names the places for a link with its counts.
func statsDest(st *linkStats) []any {
	return append(linkDest(&st.link), &st.ClickCount, &st.LastClickedAt, &st.BotClicks)
}

// dayDest and hostDest name the places for one day and for one referrer.
func dayDest(d *dayCount) []any   { return []any{&d.Day, &d.Clicks} }
func hostDest(h *hostCount) []any { return []any{&h.Referrer, &h.Clicks} }
