package main

import (
	"bufio"
	"context"
	"database/sql"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Writing what a database holds: hop export writes the CSV files of tables.go, hop export --map
// what nginx redirects by.

// exportWithin ends an export whose server has stopped answering. 100 M rows take 10 minutes.
const exportWithin = 2 * time.Hour

// partSuffix marks files that are still being written: an export that fails leaves those of an
// earlier one whole.
const partSuffix = ".part"

// export writes the files to dir, which is made if need be, as of one moment.
func (s *Store) export(ctx context.Context, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, exportWithin)
	defer cancel()
	if err := os.MkdirAll(dir, 0o700); err != nil { // names and addresses of people are in it
		return err
	}
	var written []string
	var empty []string
	err := s.inSnapshot(ctx, func(tx *sql.Tx) error {
		for _, t := range csvTables() {
			name := filepath.Join(dir, t.name+".csv")
			rows, err := t.export(ctx, tx, name+partSuffix)
			if err != nil {
				return err
			}
			if rows == 0 && t.optional {
				empty = append(empty, name)
			} else {
				written = append(written, name)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return putInPlace(written, empty)
}

// putInPlace gives files that have been written their names, and removes those of an earlier export
// that would be empty now.
func putInPlace(written, empty []string) error {
	for _, name := range written {
		if err := os.Rename(name+partSuffix, name); err != nil {
			return err
		}
	}
	for _, name := range empty {
		if err := os.Remove(name + partSuffix); err != nil {
			return err
		}
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// export writes one file and returns how many rows it has.
func (t csvTable) export(ctx context.Context, tx *sql.Tx, name string) (int, error) {
	file, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return 0, err
	}
	defer file.Close() // for the early returns; the Close that counts is below
	rows, err := tx.QueryContext(ctx, t.query)
	if err != nil {
		return 0, err
	}
	defer rows.Close()
	w := csv.NewWriter(file)
	header := make([]string, len(t.columns))
	for i, c := range t.columns {
		header[i] = c.name
	}
	w.Write(header)
	record := t.record
	if record == nil {
		record = scanTexts
	}
	count := 0
	for rows.Next() {
		fields, err := record(rows)
		if err != nil {
			return 0, err
		}
		if err := w.Write(fields); err != nil {
			return 0, err // a full disk is no news after the last of 100 M rows
		}
		count++
	}
	w.Flush()
	return count, errors.Join(rows.Err(), w.Error(), file.Sync(), file.Close())
}

// ---- a map for nginx ----

// maxMapTarget is how many bytes of a parameter nginx reads.
const maxMapTarget = 4000

// exportMap writes all live links as lines that nginx's map directive reads:
//
//	map $code $target { include hop.map; }
//
// where $code is the path without its slash. nginx compares strings without regard to case; codes
// that differ in nothing else, from whatever link, are written as regular expressions, which do
// not.
func (s *Store) exportMap(ctx context.Context, out io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, exportWithin)
	defer cancel()
	return s.inSnapshot(ctx, func(tx *sql.Tx) error {
		rows, err := tx.QueryContext(ctx, `
			SELECT short_code, original_url, alike
			FROM (SELECT *, count(*) OVER (PARTITION BY lower(short_code)) > 1 AS alike
			      FROM urls) AS urls
			WHERE `+isLive+` ORDER BY id`)
		if err != nil {
			return err
		}
		defer rows.Close()
		lines := bufio.NewWriter(out)
		for rows.Next() {
			var code, target string
			var alike bool
			if err := rows.Scan(&code, &target, &alike); err != nil {
				return err
			}
			if _, err := lines.WriteString(mapLine(code, target, alike)); err != nil {
				return err
			}
		}
		return errors.Join(rows.Err(), lines.Flush())
	})
}

// mapWords are the parameters of nginx's map, which a code may look like.
var mapWords = map[string]bool{
	"default": true, "hostnames": true, "include": true, "volatile": true,
}

// mapLine is the line of one link. alike says that another code differs only in case.
func mapLine(code, target string, alike bool) string {
	key := code
	switch {
	case alike:
		key = `"~^` + code + `$"`
	case mapWords[strings.ToLower(code)]:
		key = `\` + code
	}
	// A Location has neither quotes nor backslashes, and a dollar would begin a variable's name.
	value := strings.ReplaceAll(asciiLocation(target), "$", "%24")
	if len(value) > maxMapTarget {
		return fmt.Sprintf("# %s: the target is too long for nginx\n", code)
	}
	return fmt.Sprintf("%s \"%s\";\n", key, value)
}
