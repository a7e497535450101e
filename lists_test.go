package main

import (
	"database/sql"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
)

const (
	manyLinks  = 200_000
	manyEvents = 1_000_000
	manyUsers  = 5_000
)

// fillLists makes a database of the growth issue's size: a user and a link that own much of it, and a rare event type.
func fillLists(t *testing.T) *sql.DB {
	start := time.Now()
	dsn := testDatabase(t)
	startApp(t, "DATABASE_URL="+dsn).stop() // applies the schema
	db := openDB(t, dsn)
	for _, q := range []string{
		`ALTER TABLE urls SET UNLOGGED`, `ALTER TABLE events SET UNLOGGED`, // fewer bytes, the same plans
		`DROP INDEX events_by_url, events_by_user, events_by_type, urls_by_user, urls_by_active`,
		fmt.Sprintf(`INSERT INTO users (username, email, created_at) SELECT 'u' || i, 'u' || i || '@example.com', now() FROM generate_series(1, %d) i`, manyUsers),
		fmt.Sprintf(`INSERT INTO urls (user_id, short_code, original_url, title, is_active, created_at, updated_at, deleted_at)
			SELECT CASE WHEN i %% 4 = 0 THEN 1 WHEN i %% 10 = 1 THEN NULL ELSE 1 + i * 7 %% %d END, 'code' || i, 'https://example.com/some/path/' || i, 'title ' || i, i %% 6 > 0, now(), now(),
			CASE WHEN i %% 20 = 3 THEN now() END FROM generate_series(1, %d) i`, manyUsers, manyLinks),
		fmt.Sprintf(`INSERT INTO events (url_id, user_id, event_type, timestamp, details)
			SELECT CASE WHEN i %% 5 = 0 THEN 7 ELSE 1 + i::bigint * 31 %% %d END, CASE WHEN i %% 4 = 0 THEN 1 WHEN i %% 10 = 1 THEN NULL ELSE 1 + i * 7 %% %d END,
			CASE WHEN i %% 5000 = 0 THEN 'deleted' WHEN i %% 3 = 0 THEN 'updated' ELSE 'click' END, now(), '{"short_code":"c1"}' FROM generate_series(1, %d) i`, manyLinks, manyUsers, manyEvents),
		schema, // the indexes again
		`ANALYZE`,
	} {
		if _, err := db.Exec(q); err != nil {
			t.Fatalf("%v in %s", err, q)
		}
	}
	t.Logf("%d links and %d events in %v", manyLinks, manyEvents, time.Since(start).Round(time.Millisecond))
	return db
}

// plan is what EXPLAIN says of a query.
type plan struct {
	Node    string  `json:"Node Type"`
	Index   string  `json:"Index Name"`
	Rows    float64 `json:"Actual Rows"`
	Hit     int     `json:"Shared Hit Blocks"`
	Read    int     `json:"Shared Read Blocks"`
	Plans   []plan  `json:"Plans"`
	Removed float64 `json:"Rows Removed by Filter"`
}

// each calls f for p and all below.
func (p plan) each(f func(plan)) {
	f(p)
	for _, below := range p.Plans {
		below.each(f)
	}
}

func (p plan) String() string {
	var b strings.Builder
	p.each(func(p plan) {
		fmt.Fprintf(&b, "%s %s (%v rows, %v removed, %d buffers); ", p.Node, p.Index, p.Rows, p.Removed, p.Hit+p.Read)
	})
	return b.String()
}

// TestListPlans explains every list with every filter and at every depth, on 200,000 links and 1,000,000 events: each reads an
// index range, and what follows a Link header costs the same however deep it is.
func TestListPlans(t *testing.T) {
	if testing.Short() {
		t.Skip("fills a large database")
	}
	db := fillLists(t)
	explain := func(t *testing.T, table, columns string, f filter, p page) plan {
		query, args := listSQL(table, columns, f, p)
		var text []byte
		if err := db.QueryRow("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) "+query, args...).Scan(&text); err != nil {
			t.Fatalf("%v in %s", err, query)
		}
		var out []struct{ Plan plan }
		if err := json.Unmarshal(text, &out); err != nil {
			t.Fatal(err)
		}
		out[0].Plan.each(func(p plan) {
			if p.Node == "Seq Scan" || p.Node == "Parallel Seq Scan" {
				t.Errorf("%s reads the whole table: %s", query, out[0].Plan)
			}
		})
		return out[0].Plan
	}
	worst, worstPlan := 0, ""
	defer func() { t.Logf("the dearest page reads %d buffers: %s", worst, worstPlan) }()
	type conds []string
	values := map[string][]any{ // of each filter: much, little, nothing
		"user_id = ?":    {1, 4321, -1},
		"is_active = ?":  {true, false},
		"short_code = ?": {"code777", "none"},
		"url_id = ?":     {7, 199_998, 1 << 60},
		"event_type = ?": {"click", "deleted", "none"},
	}
	for _, list := range []struct {
		table, columns string
		base           []string
		filters        []conds
		deep           int64 // an id near the end
	}{
		{"users", userCols, nil, []conds{{}}, manyUsers - 1500},
		{"urls", linkCols, []string{"deleted_at IS NULL"}, []conds{{}, {"user_id = ?"}, {"is_active = ?"}, {"short_code = ?"}, {"user_id = ?", "is_active = ?"},
			{"user_id = ?", "short_code = ?"}, {"is_active = ?", "short_code = ?"}, {"user_id = ?", "is_active = ?", "short_code = ?"}}, manyLinks - 20_000},
		{"events", eventCols, nil, []conds{{}, {"url_id = ?"}, {"user_id = ?"}, {"event_type = ?"}, {"url_id = ?", "user_id = ?"}, {"url_id = ?", "event_type = ?"},
			{"user_id = ?", "event_type = ?"}, {"url_id = ?", "user_id = ?", "event_type = ?"}}, manyEvents - 50_000},
	} {
		for _, cs := range list.filters {
			combinations := [][]any{nil}
			for _, c := range cs {
				var longer [][]any
				for _, combination := range combinations {
					for _, v := range values[c] {
						longer = append(longer, append(append([]any(nil), combination...), v))
					}
				}
				combinations = longer
			}
			for _, args := range combinations {
				name := list.table
				f := filter{conds: append([]string(nil), list.base...)}
				for i, c := range cs {
					f.and(c, args[i])
					name += " " + strings.Replace(c, "?", fmt.Sprint(args[i]), 1)
				}
				t.Run(name, func(t *testing.T) {
					first := explain(t, list.table, list.columns, f, page{limit: maxBulk})
					deep := explain(t, list.table, list.columns, f, page{limit: maxBulk, after: list.deep})
					explain(t, list.table, list.columns, f, page{limit: maxBulk, offset: 90 * maxBulk})
					explain(t, list.table, list.columns, f, page{limit: 10, offset: 1 << 40})
					if deep.Rows > 0 && first.Rows >= deep.Rows && deep.Hit+deep.Read > (first.Hit+first.Read)*3/2+50 {
						t.Errorf("deep pages cost more: %s instead of %s", deep, first)
					}
					for _, p := range []plan{first, deep} {
						buffers := p.Hit + p.Read
						if len(cs) < 2 && buffers > 3*maxBulk {
							t.Errorf("%d buffers for a page: %s", buffers, p)
						}
						if buffers > worst {
							worst, worstPlan = buffers, name+": "+p.String()
						}
					}
				})
			}
		}
	}
}
