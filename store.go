package main

import (
	"context"
	"database/sql"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/lib/pq"
)

// What hop asks PostgreSQL, one method per question with its SQL beside it. How it asks is in postgres.go.

//go:embed schema.sql
var schema string

// The store speaks in these errors; nothing above it knows PostgreSQL's.
var (
	errNotFound    = errors.New("not found")
	errNoUser      = errors.New("unknown user")
	errNoLink      = errors.New("unknown link")
	errCodeTaken   = errors.New("code taken")
	errUserExists  = errors.New("user exists")
	errUnavailable = errors.New("database unavailable") // down, hung, or too busy to answer in time: ask again
)

// isOurs says whether err needs no translation.
func isOurs(err error) bool {
	return slices.Contains([]error{errNotFound, errNoUser, errNoLink, errUserExists, errUnavailable}, err)
}

const (
	clickLock, userLock, schemaLock = 0x686f7001, 0x686f7002, 0x686f7003 // advisory locks: "hop" and a number

	utcNow    = `date_trunc('second', now() AT TIME ZONE 'UTC')`
	userCols  = `id, username, email, created_at`
	linkCols  = `id, user_id, short_code, original_url, title, is_active, created_at, updated_at, expires_at`
	eventCols = `id, url_id, user_id, event_type, timestamp, details`
	isLive    = `is_active AND deleted_at IS NULL AND (expires_at IS NULL OR expires_at > now() AT TIME ZONE 'UTC')`
	expiresAt = `COALESCE(EXTRACT(EPOCH FROM expires_at)::bigint, 0)`
)

// stamp is a time as the contract writes it: UTC, whole seconds, no zone.
type stamp struct{ time.Time }

func (t stamp) MarshalJSON() ([]byte, error) { return t.AppendFormat(nil, `"`+wireTime+`"`), nil }

// Scan takes what lib/pq gives for a timestamp column.
func (t *stamp) Scan(v any) (err error) {
	var ok bool
	if t.Time, ok = v.(time.Time); !ok {
		err = fmt.Errorf("cannot read %T as a time", v)
	}
	return err
}

// user is a row of users.
type user struct {
	ID        int64  `json:"id"`
	Username  string `json:"username"`
	Email     string `json:"email"`
	CreatedAt stamp  `json:"created_at"`
}

// link is a row of urls without its counts.
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

// event is a row of events.
type event struct {
	ID        int64           `json:"id"`
	URLID     int64           `json:"url_id"`
	UserID    *int64          `json:"user_id"`
	EventType string          `json:"event_type"`
	Timestamp stamp           `json:"timestamp"`
	Details   json.RawMessage `json:"details"`
}

// The places to scan a row of userCols, linkCols and eventCols into.
func userDest(u *user) []any { return []any{&u.ID, &u.Username, &u.Email, &u.CreatedAt} }
func linkDest(l *link) []any {
	return []any{&l.ID, &l.UserID, &l.ShortCode, &l.OriginalURL, &l.Title, &l.IsActive, &l.CreatedAt, &l.UpdatedAt, &l.ExpiresAt}
}
func eventDest(e *event) []any {
	return []any{&e.ID, &e.URLID, &e.UserID, &e.EventType, &e.Timestamp, &e.Details}
}

// collect returns all rows of a query, dest naming the places of one row.
func collect[T any](c *sql.Conn, dest func(*T) []any, query string, args ...any) ([]T, error) {
	rows, err := c.QueryContext(context.Background(), query, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	all := []T{}
	for rows.Next() {
		all = append(all, *new(T))
		if err := rows.Scan(dest(&all[len(all)-1])...); err != nil {
			return nil, err
		}
	}
	return all, rows.Err()
}

// one returns the one row of a query, or errNotFound.
func one[T any](s *Store, dest func(*T) []any, query string, args ...any) (T, error) {
	return read(s, func(c *sql.Conn) (v T, err error) {
		err = c.QueryRowContext(context.Background(), query, args...).Scan(dest(&v)...)
		return v, err
	})
}

// filter is a WHERE clause and its arguments.
type filter struct {
	conds []string
	args  []any
}

// and adds a condition whose ? stands for value.
func (f *filter) and(cond string, value any) {
	f.args = append(f.args, value)
	f.conds = append(f.conds, strings.Replace(cond, "?", fmt.Sprintf("$%d", len(f.args)), 1))
}

// list returns one page of a table in id order and one row more, if there is one, to know of a next page.
func list[T any](s *Store, table, columns string, f filter, p page, dest func(*T) []any) ([]T, error) {
	query, args := listSQL(table, columns, f, p)
	return read(s, func(c *sql.Conn) ([]T, error) { return collect(c, dest, query, args...) })
}

// listSQL writes the query of list. Every page is an index range; for a page by number the index is walked to its first id.
func listSQL(table, columns string, f filter, p page) (string, []any) {
	f.and("id > ?", p.after)
	if p.offset > 0 {
		f.and("id >= (SELECT id FROM "+table+" WHERE "+strings.Join(f.conds, " AND ")+" ORDER BY id LIMIT 1 OFFSET ?)", p.offset)
	}
	return fmt.Sprintf("SELECT %s FROM %s WHERE %s ORDER BY id LIMIT %d", columns, table, strings.Join(f.conds, " AND "), p.limit+1), f.args
}

// ---- redirects ----

// target is what a code leads to. The zero target is a 404: unknown, sleeping, expired or deleted.
type target struct {
	id       int64
	location []string // one value, kept as the header map wants it, so that a redirect allocates nothing for it
	expires  int64    // unix seconds, 0 is never
}

// live says whether the target may be served at unix time now.
func (t target) live(now int64) bool { return t.id != 0 && (t.expires == 0 || now < t.expires) }

// namedTarget is a target and the code that leads to it.
type namedTarget struct {
	code string
	target
}

func targetDest(t *namedTarget) []any {
	t.location = make([]string, 1)
	return []any{&t.id, &t.code, &t.location[0], &t.expires}
}

// target returns what code leads to.
func (s *Store) target(code string) (target, error) {
	t, err := one(s, targetDest, `SELECT id, short_code, original_url, `+expiresAt+` FROM urls WHERE short_code = $1 AND `+isLive, code)
	if err == errNotFound {
		return target{}, nil
	}
	return t.target, err
}

// targets returns up to n live targets with ids above after, in id order, for warming. It may take as long as backTimeout.
func (s *Store) targets(after int64, n int) ([]namedTarget, error) {
	return onLive(context.Background(), s.back, func(c *sql.Conn) ([]namedTarget, error) {
		return collect(c, targetDest, `SELECT id, short_code, original_url, `+expiresAt+` FROM urls WHERE id > $1 AND `+isLive+` ORDER BY id LIMIT $2`, after, n)
	})
}

// ---- users ----

// createUser adds a user with a name and an e-mail nobody has. The lock makes of two at once one win; a unique index cannot,
// since bulk-loaded files hold equal names.
func (s *Store) createUser(username, email string) (user, error) {
	return write(s, func(t *txn) (u user) {
		t.lock(userLock)
		t.row(errUserExists, userDest(&u), `
			INSERT INTO users (username, email, created_at) SELECT $1, $2, `+utcNow+`
			WHERE NOT EXISTS (SELECT 1 FROM users WHERE username = $1) AND NOT EXISTS (SELECT 1 FROM users WHERE email = $2)
			RETURNING `+userCols, username, email)
		return u
	})
}

// user returns one user.
func (s *Store) user(id int64) (user, error) {
	return one(s, userDest, `SELECT `+userCols+` FROM users WHERE id = $1`, id)
}

// updateUser sets what is not "" and leaves the rest; a name or e-mail that stays as it is may be shared.
func (s *Store) updateUser(id int64, username, email string) (user, error) {
	return write(s, func(t *txn) (u user) {
		var taken bool
		t.lock(userLock)
		t.row(errNotFound, []any{&taken}, `
			SELECT EXISTS (SELECT 1 FROM users o WHERE o.username = $2 AND o.id <> u.id AND u.username <> $2)
			    OR EXISTS (SELECT 1 FROM users o WHERE o.email = $3 AND o.id <> u.id AND u.email <> $3)
			FROM users u WHERE u.id = $1`, id, username, email)
		if taken {
			t.err = errUserExists
		}
		t.row(errNotFound, userDest(&u), `
			UPDATE users SET username = COALESCE(NULLIF($2, ''), username), email = COALESCE(NULLIF($3, ''), email)
			WHERE id = $1 RETURNING `+userCols, id, username, email)
		return u
	})
}

// deleteUser removes a user; links and events stay, without an owner. It takes the flushes' lock, since both touch many rows of
// urls and would deadlock.
func (s *Store) deleteUser(id int64) error {
	_, err := write(s, func(t *txn) int64 {
		t.lock(clickLock)
		if t.exec(`DELETE FROM users WHERE id = $1`, id) == 0 && t.err == nil {
			t.err = errNotFound
		}
		return t.exec(`UPDATE events SET user_id = NULL WHERE user_id = $1`, id)
	})
	return err
}

// ---- links ----

// newLink is a link to be made. Zero fields are absent.
type newLink struct {
	userID           int64
	code, url, title string
	expires          time.Time
}

// made is what became of a newLink: a link, or errNoUser, or errCodeTaken.
type made struct {
	link    link
	err     error
	pending bool // other replicas' caches have not heard of it yet
}

// createLinks makes all the links it can, in one statement and so one commit, and logs a created event for each. The codes must
// differ from each other.
func (s *Store) createLinks(links []newLink) ([]made, error) {
	var users pq.Int64Array
	var codes, urls, titles, expiries, details pq.StringArray
	for _, l := range links {
		expires := ""
		if !l.expires.IsZero() {
			expires = l.expires.Format(csvTime)
		}
		users, codes, urls, titles, expiries = append(users, l.userID), append(codes, l.code), append(urls, l.url), append(titles, l.title), append(expiries, expires)
		details = append(details, jsonText(struct {
			Code string `json:"short_code"`
			URL  string `json:"original_url"`
		}{l.code, l.url}))
	}
	type row struct {
		n       int
		known   bool
		id      int64
		created stamp
	}
	rows, err := ask(s, func(ctx context.Context) ([]row, error) {
		return onConn(ctx, s.db, func(c *sql.Conn) ([]row, error) {
			return collect(c, func(r *row) []any { return []any{&r.n, &r.known, &r.id, &r.created} }, `
			WITH item AS (
			    SELECT *, user_id = 0 OR EXISTS (SELECT 1 FROM users WHERE users.id = i.user_id) AS known
			    FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[]) WITH ORDINALITY
			         AS i (user_id, short_code, original_url, title, expires_at, details, n)
			), made AS (
			    INSERT INTO urls (user_id, short_code, original_url, title, expires_at, created_at, updated_at)
			    SELECT NULLIF(user_id, 0), short_code, original_url, NULLIF(title, ''), NULLIF(expires_at, '')::timestamp, `+utcNow+`, `+utcNow+`
			    FROM item WHERE known ON CONFLICT (short_code) DO NOTHING
			    RETURNING id, user_id, short_code, created_at
			), logged AS (
			    INSERT INTO events (url_id, user_id, event_type, timestamp, details)
			    SELECT made.id, made.user_id, 'created', made.created_at, item.details::json FROM made JOIN item USING (short_code)
			)
			SELECT n - 1, known, COALESCE(made.id, 0), COALESCE(made.created_at, `+utcNow+`) FROM item LEFT JOIN made USING (short_code)`,
				users, codes, urls, titles, expiries, details)
		})
	})
	results := make([]made, len(links))
	for _, r := range rows {
		switch m := &results[r.n]; {
		case !r.known:
			m.err = errNoUser
		case r.id == 0:
			m.err = errCodeTaken
		default:
			m.link = links[r.n].row(r.id, r.created)
		}
	}
	return results, err
}

// row is the row that creating l gave.
func (l newLink) row(id int64, created stamp) link {
	row := link{ID: id, ShortCode: l.code, OriginalURL: l.url, IsActive: true, CreatedAt: created, UpdatedAt: created}
	if l.userID != 0 {
		row.UserID = &l.userID
	}
	if l.title != "" {
		row.Title = &l.title
	}
	if !l.expires.IsZero() {
		row.ExpiresAt = &stamp{l.expires}
	}
	return row
}

// link returns one link that was not deleted.
func (s *Store) link(id int64) (link, error) {
	return one(s, linkDest, `SELECT `+linkCols+` FROM urls WHERE id = $1 AND deleted_at IS NULL`, id)
}

// linkChange is what a PUT sets; a nil or unset field stays.
type linkChange struct {
	url      *string
	active   *bool
	title    *string // "" clears it
	expires  time.Time
	expiring bool // expires was sent; the zero time clears it
}

// updateLink changes a link and logs one updated event per field whose value is another one now.
func (s *Store) updateLink(id int64, ch linkChange) (link, error) {
	return write(s, func(t *txn) (l link) {
		var old link
		t.row(errNotFound, linkDest(&old), `SELECT `+linkCols+` FROM urls WHERE id = $1 AND deleted_at IS NULL FOR UPDATE`, id)
		t.row(errNotFound, linkDest(&l), `
			UPDATE urls SET original_url = COALESCE($2, original_url), is_active = COALESCE($3, is_active),
			    title = CASE WHEN $4::text IS NULL THEN title ELSE NULLIF($4, '') END,
			    expires_at = CASE WHEN $5 THEN $6::timestamp ELSE expires_at END,
			    updated_at = GREATEST(`+utcNow+`, updated_at + interval '1 second')
			WHERE id = $1 RETURNING `+linkCols, id, ch.url, ch.active, ch.title, ch.expiring, sql.NullTime{Time: ch.expires, Valid: !ch.expires.IsZero()})
		before, after := old.fields(), l.fields()
		for i, field := range []string{"original_url", "title", "is_active", "expires_at"} {
			if before[i] != after[i] && t.err == nil {
				t.exec(`INSERT INTO events (url_id, user_id, event_type, timestamp, details) VALUES ($1, $2, 'updated', `+utcNow+`, $3)`,
					id, l.UserID, jsonText(struct {
						Field string `json:"field"`
						Value string `json:"new_value"`
					}{field, after[i]}))
			}
		}
		return l
	})
}

// fields are what a PUT may change, as strings, which is what the platform's updated events hold.
func (l link) fields() [4]string {
	var title, expires string
	if l.Title != nil {
		title = *l.Title
	}
	if l.ExpiresAt != nil {
		expires = l.ExpiresAt.Format(wireTime)
	}
	return [4]string{l.OriginalURL, title, fmt.Sprint(l.IsActive), expires}
}

// deleteLink hides a link for good and logs it.
func (s *Store) deleteLink(id int64) error {
	_, err := write(s, func(t *txn) (n int64) {
		n = t.exec(`
			WITH gone AS (
			    UPDATE urls SET deleted_at = `+utcNow+`, updated_at = GREATEST(`+utcNow+`, updated_at + interval '1 second')
			    WHERE id = $1 AND deleted_at IS NULL RETURNING id, user_id
			)
			INSERT INTO events (url_id, user_id, event_type, timestamp, details)
			SELECT id, user_id, 'deleted', `+utcNow+`, '{"reason":"user_requested"}' FROM gone`, id)
		if n == 0 && t.err == nil {
			t.err = errNotFound
		}
		return n
	})
	return err
}

// linkStats is a link with its counts: the days newest first, at most a year of them, and the ten hosts that sent most people.
type linkStats struct {
	link
	ClickCount    int64       `json:"click_count"`
	LastClickedAt *stamp      `json:"last_clicked_at"`
	BotClicks     int64       `json:"bot_clicks"`
	ClicksPerDay  []dayCount  `json:"clicks_per_day"`
	TopReferrers  []hostCount `json:"top_referrers"`
}

type dayCount struct {
	Day    string `json:"day"`
	Clicks int64  `json:"clicks"`
}

type hostCount struct {
	Referrer string `json:"referrer"`
	Clicks   int64  `json:"clicks"`
}

// stats returns the counts of a link that was not deleted, as far as they are flushed.
func (s *Store) stats(code string) (linkStats, error) {
	return read(s, func(c *sql.Conn) (st linkStats, err error) {
		err = c.QueryRowContext(context.Background(), `
			SELECT `+linkCols+`, click_count, last_clicked_at, COALESCE((SELECT sum(bots) FROM clicks_daily WHERE url_id = urls.id), 0)::bigint
			FROM urls WHERE short_code = $1 AND deleted_at IS NULL`, code).
			Scan(append(linkDest(&st.link), &st.ClickCount, &st.LastClickedAt, &st.BotClicks)...)
		if err == nil {
			st.ClicksPerDay, err = collect(c, func(d *dayCount) []any { return []any{&d.Day, &d.Clicks} }, `
				SELECT day::text, sum(clicks)::bigint FROM clicks_daily WHERE url_id = $1 AND clicks > 0
				GROUP BY day ORDER BY day DESC LIMIT 366`, st.ID)
		}
		if err == nil {
			st.TopReferrers, err = collect(c, func(h *hostCount) []any { return []any{&h.Referrer, &h.Clicks} }, `
				SELECT referrer, sum(clicks)::bigint FROM clicks_daily WHERE url_id = $1 AND clicks > 0 AND referrer <> ''
				GROUP BY referrer ORDER BY 2 DESC, 1 LIMIT 10`, st.ID)
		}
		return st, err
	})
}

// ---- events and clicks ----

// createEvent logs what a client reports. userID 0 is nobody. The locks keep link and user until the event stands.
func (s *Store) createEvent(urlID, userID int64, kind, details string) (event, error) {
	return write(s, func(t *txn) (e event) {
		var found int
		t.row(errNoLink, []any{&found}, `SELECT 1 FROM urls WHERE id = $1 AND deleted_at IS NULL FOR KEY SHARE`, urlID)
		if userID != 0 {
			t.row(errNoUser, []any{&found}, `SELECT 1 FROM users WHERE id = $1 FOR KEY SHARE`, userID)
		}
		t.row(errNotFound, eventDest(&e), `
			INSERT INTO events (url_id, user_id, event_type, timestamp, details)
			VALUES ($1, NULLIF($2::bigint, 0), $3, `+utcNow+`, $4) RETURNING `+eventCols, urlID, userID, kind, details)
		return e
	})
}

// saveClicks counts one batch of clicks of a journal exactly once, however often it is called: true if it counted now, false if
// an earlier call had, whatever that one answered. It may take as long as backTimeout.
func (s *Store) saveClicks(b clickBatch) (bool, error) {
	return inTx(context.Background(), s.back, func(t *txn) bool {
		claimed := t.exec(`
			INSERT INTO click_journals (id, batch) VALUES ($1, $2)
			ON CONFLICT (id) DO UPDATE SET batch = excluded.batch WHERE click_journals.batch < excluded.batch`, b.journal, b.number)
		if claimed == 0 {
			return false
		}
		t.lock(clickLock) // flushes of four replicas side by side deadlocked in 214 of 240 tries; one at a time never
		t.exec(`
			WITH click AS MATERIALIZED (
			    SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::smallint[], $5::text[]) AS c (id, at, n, kind, referrer)
			), counted AS (
			    UPDATE urls SET click_count = click_count + c.n, last_clicked_at = GREATEST(last_clicked_at, to_timestamp(c.last) AT TIME ZONE 'UTC')
			    FROM (SELECT id, sum(n) AS n, max(at) AS last FROM click WHERE kind < 2 GROUP BY id) AS c WHERE urls.id = c.id
			), rolled AS (
			    INSERT INTO clicks_daily (url_id, day, referrer, clicks, bots)
			    SELECT id, (to_timestamp(day * 86400) AT TIME ZONE 'UTC')::date, referrer, clicks, bots
			    FROM (SELECT id, at / 86400 AS day, referrer, COALESCE(sum(n) FILTER (WHERE kind < 2), 0) AS clicks,
			                 COALESCE(sum(n) FILTER (WHERE kind = 2), 0) AS bots FROM click GROUP BY 1, 2, 3) AS c
			    ON CONFLICT (url_id, day, referrer) DO UPDATE
			    SET clicks = clicks_daily.clicks + excluded.clicks, bots = clicks_daily.bots + excluded.bots
			)
			INSERT INTO events (url_id, user_id, event_type, timestamp, details)
			SELECT urls.id, urls.user_id, 'click', to_timestamp(c.at) AT TIME ZONE 'UTC',
			       ('{"short_code":"' || short_code || CASE c.referrer WHEN '' THEN '"}' ELSE '","referrer":"' || c.referrer || '"}' END)::json
			FROM click AS c JOIN urls ON urls.id = c.id WHERE kind = 0`, b.ids, b.times, b.counts, b.kinds, b.referrers)
		return t.err == nil
	})
}
