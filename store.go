package main

import (
	"context"
	"database/sql"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
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

const (
	clickLock, userLock, schemaLock = 0x686f7001, 0x686f7002, 0x686f7003 // advisory locks: "hop" and a number

	utcNow    = `date_trunc('second', now() AT TIME ZONE 'UTC')`
	userCols  = `id, username, email, created_at`
	linkCols  = `id, user_id, short_code, original_url, title, is_active, created_at, updated_at, expires_at`
	eventCols = `id, url_id, user_id, event_type, timestamp, details`
	isLive    = `is_active AND deleted_at IS NULL AND (expires_at IS NULL OR expires_at > now() AT TIME ZONE 'UTC')`
)

// stamp is a time as the contract writes it: UTC, whole seconds, no zone.
type stamp struct{ time.Time }

func (t stamp) MarshalJSON() ([]byte, error) { return t.AppendFormat(nil, `"`+wireTime+`"`), nil }

// Scan takes what lib/pq gives for a timestamp column.
func (t *stamp) Scan(v any) error {
	var ok bool
	if t.Time, ok = v.(time.Time); !ok {
		return fmt.Errorf("cannot read %T as a time", v)
	}
	return nil
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

// ---- redirects ----

// target is what a code leads to. The zero target is a 404: unknown, sleeping, expired or deleted.
type target struct {
	id       int64
	location []string // one value, kept as the header map wants it, so that a redirect allocates nothing for it
	expires  int64    // unix seconds, 0 is never
}

// live says whether the target may be served at unix time now.
func (t target) live(now int64) bool { return t.id != 0 && (t.expires == 0 || now < t.expires) }

// target returns what code leads to.
func (s *Store) target(code string) (target, error) {
	return read(s, func(c *sql.Conn) (t target, err error) {
		var url string
		err = c.QueryRowContext(context.Background(), `
			SELECT id, original_url, COALESCE(EXTRACT(EPOCH FROM expires_at)::bigint, 0)
			FROM urls WHERE short_code = $1 AND `+isLive, code).Scan(&t.id, &url, &t.expires)
		if errors.Is(err, sql.ErrNoRows) {
			return target{}, nil
		}
		t.location = []string{url}
		return t, err
	})
}

// namedTarget is a target and the code that leads to it.
type namedTarget struct {
	code string
	target
}

// targets returns up to n live targets with ids above after, in id order, for warming. It may take as long as backTimeout.
func (s *Store) targets(after int64, n int) ([]namedTarget, error) {
	return onConn(context.Background(), s.back, func(c *sql.Conn) ([]namedTarget, error) {
		rows, err := c.QueryContext(context.Background(), `
			SELECT id, short_code, original_url, COALESCE(EXTRACT(EPOCH FROM expires_at)::bigint, 0)
			FROM urls WHERE id > $1 AND `+isLive+` ORDER BY id LIMIT $2`, after, n)
		return collect(rows, err, n, func(t *namedTarget) []any {
			t.location = make([]string, 1)
			return []any{&t.id, &t.code, &t.location[0], &t.expires}
		})
	})
}

// collect scans all rows into values of T, whose columns dest names in order. n is a hint of how many come.
func collect[T any](rows *sql.Rows, err error, n int, dest func(*T) []any) ([]T, error) {
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	all := make([]T, 0, n)
	for rows.Next() {
		all = append(all, *new(T))
		if err := rows.Scan(dest(&all[len(all)-1])...); err != nil {
			return nil, err
		}
	}
	return all, rows.Err()
}

// ---- lists ----

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

// where is the clause, TRUE without conditions.
func (f *filter) where() string { return strings.Join(append([]string{"TRUE"}, f.conds...), " AND ") }

// list returns one page of table in id order and one row more, if there is one, to know of a next page. Every page is an index
// range; for a page by number the index is walked to its first id.
func list[T any](s *Store, table, columns string, f filter, p page, dest func(*T) []any) ([]T, error) {
	sql1, args := listSQL(table, columns, f, p)
	return read(s, func(c *sql.Conn) ([]T, error) {
		rows, err := c.QueryContext(context.Background(), sql1, args...)
		return collect(rows, err, 0, dest)
	})
}

// listSQL writes the query of list.
func listSQL(table, columns string, f filter, p page) (string, []any) {
	f.and("id > ?", p.after)
	if p.offset > 0 {
		f.and("id >= (SELECT id FROM "+table+" WHERE "+f.where()+" ORDER BY id LIMIT 1 OFFSET ?)", p.offset)
	}
	return fmt.Sprintf("SELECT %s FROM %s WHERE %s ORDER BY id LIMIT %d", columns, table, f.where(), p.limit+1), f.args
}

func userDest(u *user) []any { return []any{&u.ID, &u.Username, &u.Email, &u.CreatedAt} }

func linkDest(l *link) []any {
	return []any{&l.ID, &l.UserID, &l.ShortCode, &l.OriginalURL, &l.Title, &l.IsActive, &l.CreatedAt, &l.UpdatedAt, &l.ExpiresAt}
}

func eventDest(e *event) []any {
	return []any{&e.ID, &e.URLID, &e.UserID, &e.EventType, &e.Timestamp, &e.Details}
}

// ---- users ----

// createUser adds a user with a name and an e-mail nobody has. The lock makes of two at once one win; a unique index cannot,
// since bulk-loaded files hold equal names.
func (s *Store) createUser(username, email string) (user, error) {
	return write(s, func(tx *sql.Tx) (u user, err error) {
		if err := lock(tx, userLock); err != nil {
			return u, err
		}
		err = tx.QueryRow(`
			INSERT INTO users (username, email, created_at)
			SELECT $1, $2, `+utcNow+`
			WHERE NOT EXISTS (SELECT 1 FROM users WHERE username = $1) AND NOT EXISTS (SELECT 1 FROM users WHERE email = $2)
			RETURNING `+userCols, username, email).Scan(userDest(&u)...)
		if errors.Is(err, sql.ErrNoRows) {
			err = errUserExists
		}
		return u, err
	})
}

// user returns one user.
func (s *Store) user(id int64) (user, error) {
	return read(s, func(c *sql.Conn) (u user, err error) {
		err = c.QueryRowContext(context.Background(), `SELECT `+userCols+` FROM users WHERE id = $1`, id).Scan(userDest(&u)...)
		return u, err
	})
}

// updateUser sets what is not "" and leaves the rest; a name or e-mail that stays as it is may be shared.
func (s *Store) updateUser(id int64, username, email string) (user, error) {
	return write(s, func(tx *sql.Tx) (u user, err error) {
		if err := lock(tx, userLock); err != nil {
			return u, err
		}
		var taken bool
		err = tx.QueryRow(`
			SELECT EXISTS (SELECT 1 FROM users o WHERE o.username = $2 AND o.id <> u.id AND u.username <> $2)
			    OR EXISTS (SELECT 1 FROM users o WHERE o.email = $3 AND o.id <> u.id AND u.email <> $3)
			FROM users u WHERE u.id = $1`, id, username, email).Scan(&taken)
		if err != nil {
			return u, err
		}
		if taken {
			return u, errUserExists
		}
		err = tx.QueryRow(`
			UPDATE users SET username = COALESCE(NULLIF($2, ''), username), email = COALESCE(NULLIF($3, ''), email)
			WHERE id = $1 RETURNING `+userCols, id, username, email).Scan(userDest(&u)...)
		return u, err
	})
}

// deleteUser removes a user; links and events stay, without an owner. It takes the flushes' lock, since both touch many rows of
// urls and would deadlock.
func (s *Store) deleteUser(id int64) error {
	_, err := write(s, func(tx *sql.Tx) (none struct{}, err error) {
		if err := lock(tx, clickLock); err != nil {
			return none, err
		}
		res, err := tx.Exec(`DELETE FROM users WHERE id = $1`, id)
		if err != nil {
			return none, err
		}
		if n, _ := res.RowsAffected(); n == 0 {
			return none, errNotFound
		}
		_, err = tx.Exec(`UPDATE events SET user_id = NULL WHERE user_id = $1`, id)
		return none, err
	})
	return err
}

// ---- links ----

// newLink is a link to be made. Zero fields are absent.
type newLink struct {
	userID  int64
	code    string
	url     string
	title   string
	expires time.Time
}

// made is what became of a newLink: a link, or errNoUser, or errCodeTaken.
type made struct {
	link    link
	err     error
	pending bool // other replicas' caches have not heard of it yet
}

// createLinks makes all the links it can, in one statement and so one commit, and logs a created event for each. The codes must
// differ from each other. It runs on the background pool when there are more than a request's share.
func (s *Store) createLinks(links []newLink) ([]made, error) {
	n := len(links)
	users, codes, urls := make(pq.Int64Array, n), make(pq.StringArray, n), make(pq.StringArray, n)
	titles, expiries, details := make(pq.StringArray, n), make(pq.StringArray, n), make(pq.StringArray, n)
	at := make(map[string]int, n)
	for i, l := range links {
		users[i], codes[i], urls[i], titles[i] = l.userID, l.code, l.url, l.title
		if !l.expires.IsZero() {
			expiries[i] = l.expires.Format(csvTime)
		}
		details[i] = jsonText(struct {
			Code string `json:"short_code"`
			URL  string `json:"original_url"`
		}{l.code, l.url})
		at[l.code] = i
	}
	return write(s, func(tx *sql.Tx) ([]made, error) {
		rows, err := tx.Query(`
			WITH item AS (
			    SELECT *, user_id = 0 OR EXISTS (SELECT 1 FROM users WHERE users.id = i.user_id) AS known
			    FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[])
			         AS i (user_id, short_code, original_url, title, expires_at, details)
			), made AS (
			    INSERT INTO urls (user_id, short_code, original_url, title, expires_at, created_at, updated_at)
			    SELECT NULLIF(user_id, 0), short_code, original_url, NULLIF(title, ''), NULLIF(expires_at, '')::timestamp, `+utcNow+`, `+utcNow+`
			    FROM item WHERE known
			    ON CONFLICT (short_code) DO NOTHING
			    RETURNING `+linkCols+`
			), logged AS (
			    INSERT INTO events (url_id, user_id, event_type, timestamp, details)
			    SELECT made.id, made.user_id, 'created', made.created_at, item.details::json FROM made JOIN item USING (short_code)
			)
			SELECT item.short_code, item.known, COALESCE(made.id, 0), COALESCE(made.created_at, `+utcNow+`)
			FROM item LEFT JOIN made USING (short_code)`, users, codes, urls, titles, expiries, details)
		if err != nil {
			return nil, err
		}
		defer rows.Close()
		results := make([]made, n)
		for rows.Next() {
			var code string
			var known bool
			var id int64
			var created stamp
			if err := rows.Scan(&code, &known, &id, &created); err != nil {
				return nil, err
			}
			m := &results[at[code]]
			switch {
			case !known:
				m.err = errNoUser
			case id == 0:
				m.err = errCodeTaken
			default:
				m.link = links[at[code]].made(id, created)
			}
		}
		return results, rows.Err()
	})
}

// made is the row that creating l gave.
func (l newLink) made(id int64, created stamp) link {
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
	return read(s, func(c *sql.Conn) (l link, err error) {
		err = c.QueryRowContext(context.Background(), `
			SELECT `+linkCols+` FROM urls WHERE id = $1 AND deleted_at IS NULL`, id).Scan(linkDest(&l)...)
		return l, err
	})
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
	return write(s, func(tx *sql.Tx) (l link, err error) {
		var old link
		err = tx.QueryRow(`SELECT `+linkCols+` FROM urls WHERE id = $1 AND deleted_at IS NULL FOR UPDATE`, id).Scan(linkDest(&old)...)
		if err != nil {
			return l, err
		}
		expires := sql.NullTime{Time: ch.expires, Valid: !ch.expires.IsZero()}
		err = tx.QueryRow(`
			UPDATE urls SET original_url = COALESCE($2, original_url), is_active = COALESCE($3, is_active),
			    title = CASE WHEN $4::text IS NULL THEN title ELSE NULLIF($4, '') END,
			    expires_at = CASE WHEN $5 THEN $6::timestamp ELSE expires_at END,
			    updated_at = GREATEST(`+utcNow+`, updated_at + interval '1 second')
			WHERE id = $1 RETURNING `+linkCols, id, ch.url, ch.active, ch.title, ch.expiring, expires).Scan(linkDest(&l)...)
		if err != nil {
			return l, err
		}
		for _, details := range changes(old, l) {
			_, err = tx.Exec(`
				INSERT INTO events (url_id, user_id, event_type, timestamp, details)
				VALUES ($1, $2, 'updated', `+utcNow+`, $3)`, id, l.UserID, details)
			if err != nil {
				return l, err
			}
		}
		return l, nil
	})
}

// changes lists the details of the updated events that lead from a to b. Values are strings, as in the platform's files.
func changes(a, b link) (details []string) {
	show := func(l link) [4]string {
		var title, expires string
		if l.Title != nil {
			title = *l.Title
		}
		if l.ExpiresAt != nil {
			expires = l.ExpiresAt.Format(wireTime)
		}
		return [4]string{l.OriginalURL, title, fmt.Sprint(l.IsActive), expires}
	}
	before, after := show(a), show(b)
	for i, field := range []string{"original_url", "title", "is_active", "expires_at"} {
		if before[i] != after[i] {
			details = append(details, jsonText(struct {
				Field string `json:"field"`
				Value string `json:"new_value"`
			}{field, after[i]}))
		}
	}
	return details
}

// deleteLink hides a link for good and logs it.
func (s *Store) deleteLink(id int64) error {
	_, err := write(s, func(tx *sql.Tx) (none struct{}, err error) {
		res, err := tx.Exec(`
			WITH gone AS (
			    UPDATE urls SET deleted_at = `+utcNow+`, updated_at = GREATEST(`+utcNow+`, updated_at + interval '1 second')
			    WHERE id = $1 AND deleted_at IS NULL RETURNING id, user_id
			)
			INSERT INTO events (url_id, user_id, event_type, timestamp, details)
			SELECT id, user_id, 'deleted', `+utcNow+`, '{"reason":"user_requested"}' FROM gone`, id)
		if err != nil {
			return none, err
		}
		if n, _ := res.RowsAffected(); n == 0 {
			return none, errNotFound
		}
		return none, nil
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
		ctx := context.Background()
		err = c.QueryRowContext(ctx, `
			SELECT `+linkCols+`, click_count, last_clicked_at, COALESCE((SELECT sum(bots) FROM clicks_daily WHERE url_id = urls.id), 0)::bigint
			FROM urls WHERE short_code = $1 AND deleted_at IS NULL`, code).
			Scan(append(linkDest(&st.link), &st.ClickCount, &st.LastClickedAt, &st.BotClicks)...)
		if err != nil {
			return st, err
		}
		rows, err := c.QueryContext(ctx, `
			SELECT day::text, sum(clicks)::bigint FROM clicks_daily WHERE url_id = $1 AND clicks > 0
			GROUP BY day ORDER BY day DESC LIMIT 366`, st.ID)
		st.ClicksPerDay, err = collect(rows, err, 0, func(d *dayCount) []any { return []any{&d.Day, &d.Clicks} })
		if err != nil {
			return st, err
		}
		rows, err = c.QueryContext(ctx, `
			SELECT referrer, sum(clicks)::bigint FROM clicks_daily WHERE url_id = $1 AND clicks > 0 AND referrer <> ''
			GROUP BY referrer ORDER BY 2 DESC, 1 LIMIT 10`, st.ID)
		st.TopReferrers, err = collect(rows, err, 0, func(h *hostCount) []any { return []any{&h.Referrer, &h.Clicks} })
		return st, err
	})
}

// ---- events ----

// createEvent logs what a client reports. userID 0 is nobody. The locks keep link and user until the event stands.
func (s *Store) createEvent(urlID, userID int64, kind, details string) (event, error) {
	return write(s, func(tx *sql.Tx) (e event, err error) {
		var one int
		err = tx.QueryRow(`SELECT 1 FROM urls WHERE id = $1 AND deleted_at IS NULL FOR KEY SHARE`, urlID).Scan(&one)
		if errors.Is(err, sql.ErrNoRows) {
			return e, errNoLink
		}
		if err == nil && userID != 0 {
			err = tx.QueryRow(`SELECT 1 FROM users WHERE id = $1 FOR KEY SHARE`, userID).Scan(&one)
			if errors.Is(err, sql.ErrNoRows) {
				return e, errNoUser
			}
		}
		if err != nil {
			return e, err
		}
		err = tx.QueryRow(`
			INSERT INTO events (url_id, user_id, event_type, timestamp, details)
			VALUES ($1, NULLIF($2::bigint, 0), $3, `+utcNow+`, $4) RETURNING `+eventCols, urlID, userID, kind, details).Scan(eventDest(&e)...)
		return e, err
	})
}

// saveClicks counts one batch of clicks of a journal, exactly once however often it is called: true if it counted now, false if
// an earlier call had, whatever that one answered. It may take as long as backTimeout.
func (s *Store) saveClicks(b clickBatch) (bool, error) {
	return inTx(context.Background(), s.back, func(tx *sql.Tx) (bool, error) {
		res, err := tx.Exec(`
			INSERT INTO click_journals (id, batch) VALUES ($1, $2)
			ON CONFLICT (id) DO UPDATE SET batch = excluded.batch WHERE click_journals.batch < excluded.batch`, b.journal, b.number)
		if err != nil {
			return false, err
		}
		if n, _ := res.RowsAffected(); n == 0 {
			return false, nil
		}
		if err := lock(tx, clickLock); err != nil { // unsorted flushes of four replicas deadlocked in 214 of 240 tries; one at a time never
			return false, err
		}
		_, err = tx.Exec(`
			UPDATE urls SET click_count = click_count + c.n, last_clicked_at = GREATEST(last_clicked_at, to_timestamp(c.last) AT TIME ZONE 'UTC')
			FROM unnest($1::bigint[], $2::bigint[], $3::bigint[]) AS c (id, n, last) WHERE urls.id = c.id`, b.ids, b.counts, b.last)
		if err != nil {
			return false, err
		}
		_, err = tx.Exec(`
			INSERT INTO clicks_daily (url_id, day, referrer, clicks, bots)
			SELECT id, (to_timestamp(day * 86400) AT TIME ZONE 'UTC')::date, referrer, n, bots
			FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::bigint[], $5::bigint[]) AS c (id, day, referrer, n, bots)
			ON CONFLICT (url_id, day, referrer) DO UPDATE
			SET clicks = clicks_daily.clicks + excluded.clicks, bots = clicks_daily.bots + excluded.bots`,
			b.dayIDs, b.days, b.dayReferrers, b.dayCounts, b.dayBots)
		if err != nil || len(b.eventIDs) == 0 {
			return err == nil, err
		}
		_, err = tx.Exec(`
			INSERT INTO events (url_id, user_id, event_type, timestamp, details)
			SELECT urls.id, urls.user_id, 'click', to_timestamp(c.at) AT TIME ZONE 'UTC',
			       ('{"short_code":"' || short_code || CASE c.referrer WHEN '' THEN '"}' ELSE '","referrer":"' || c.referrer || '"}' END)::json
			FROM unnest($1::bigint[], $2::bigint[], $3::text[]) AS c (id, at, referrer) JOIN urls ON urls.id = c.id`,
			b.eventIDs, b.eventTimes, b.eventReferrers)
		return err == nil, err
	})
}
