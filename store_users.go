package main

import (
	"context"
	"database/sql"
)

// What hop asks PostgreSQL about users.

// createUser adds a user with a name and an e-mail that nobody has. The lock makes of two at once
// one win; a unique index cannot, since bulk-loaded files hold equal names.
func (s *Store) createUser(ctx context.Context, username, email string) (user, error) {
	var u user
	err := s.pg.requests.inTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		if err := txLock(ctx, tx, userLock); err != nil {
			return err
		}
		return txQueryOne(ctx, tx, errUserExists, userDest(&u), `
			INSERT INTO users (username, email, created_at)
			SELECT $1, $2, `+utcNow+`
			WHERE NOT EXISTS (SELECT 1 FROM users WHERE username = $1)
			  AND NOT EXISTS (SELECT 1 FROM users WHERE email = $2)
			RETURNING `+userCols, username, email)
	})
	return u, err
}

// user returns one user.
func (s *Store) user(ctx context.Context, id int64) (user, error) {
	return queryOne(ctx, s.pg.readers, userDest,
		`SELECT `+userCols+` FROM users WHERE id = $1`, id)
}

// listUsers returns one page of users in id order.
func (s *Store) listUsers(ctx context.Context, p page) (listed[user], error) {
	q := listQuery{columns: userCols, table: "users"}
	return list(ctx, s.pg.readers, userDest, q, p)
}

// updateUser sets what is not "" and leaves the rest. A name or an e-mail that stays as it is may
// be another user's too.
func (s *Store) updateUser(ctx context.Context, id int64, username, email string) (user, error) {
	var u user
	err := s.pg.requests.inTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		if err := txLock(ctx, tx, userLock); err != nil {
			return err
		}
		var taken bool
		err := txQueryOne(ctx, tx, errNotFound, []any{&taken}, `
			SELECT EXISTS (SELECT 1 FROM users AS o
			               WHERE o.username = $2 AND o.id <> u.id AND u.username <> $2)
			    OR EXISTS (SELECT 1 FROM users AS o
			               WHERE o.email = $3 AND o.id <> u.id AND u.email <> $3)
			FROM users AS u WHERE u.id = $1`, id, username, email)
		if err != nil {
			return err
		}
		if taken {
			return errUserExists
		}
		return txQueryOne(ctx, tx, errNotFound, userDest(&u), `
			UPDATE users SET username = COALESCE(NULLIF($2, ''), username),
			                 email = COALESCE(NULLIF($3, ''), email)
			WHERE id = $1 RETURNING `+userCols, id, username, email)
	})
	return u, err
}

// removeStep is how many rows one step of a removal touches: a few ms, so that nobody who wants
// one of these rows waits longer.
const removeStep = 500

// deleteUser removes a user; links and events stay, without an owner. It goes on in small
// transactions until ctx ends, and what it has done stays done: asked again, it goes on from there.
func (s *Store) deleteUser(ctx context.Context, id int64) error {
	if _, err := s.user(ctx, id); err != nil {
		return err
	}
	// In id order, so that two removals do not deadlock. A flush of clicks locks in any order: who
	// loses to it is tried again (collided).
	disown := []string{`
		UPDATE events SET user_id = NULL WHERE id IN (
		    SELECT id FROM events WHERE user_id = $1 ORDER BY id LIMIT $2 FOR UPDATE)`, `
		UPDATE urls SET user_id = NULL WHERE id IN (
		    SELECT id FROM urls WHERE user_id = $1 ORDER BY id LIMIT $2 FOR UPDATE)`,
	}
	for _, statement := range disown {
		for touched := int64(removeStep); touched == removeStep; {
			err := s.pg.requests.inTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
				var err error
				touched, err = txExec(ctx, tx, statement, id, removeStep)
				return err
			})
			if err != nil {
				return err
			}
		}
	}
	return s.pg.requests.inTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		removed, err := txExec(ctx, tx, `DELETE FROM users WHERE id = $1`, id)
		if err == nil && removed == 0 {
			return errNotFound // somebody else removed it meanwhile
		}
		if err != nil {
			return err
		}
		// Events that were logged meanwhile. Now that the row is locked, no more can follow.
		_, err = txExec(ctx, tx, `UPDATE events SET user_id = NULL WHERE user_id = $1`, id)
		return err
	})
}
