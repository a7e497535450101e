// Redigo is the usual cached redirect: one GET on a pooled Redis connection per request, with
// default GC and server settings. The pool keeps its connections, so that it does not dial under
// load.
//
//	redigo PORT seeds/urls.csv redis://host:port/db
package main

import (
	"encoding/csv"
	"log"
	"net/http"
	"os"

	"github.com/gomodule/redigo/redis"
)

func main() {
	dial := func() (redis.Conn, error) { return redis.DialURL(os.Args[3]) }
	pool := &redis.Pool{MaxIdle: 1000, Dial: dial}
	do := func(args ...any) (any, error) {
		conn := pool.Get()
		defer conn.Close()
		return conn.Do(args[0].(string), args[1:]...)
	}
	for _, row := range must(csv.NewReader(must(os.Open(os.Args[2]))).ReadAll()) {
		must(do("SET", "redigo:"+row[2], row[3])) // short_code, original_url
	}
	http.HandleFunc("GET /{code}", func(w http.ResponseWriter, r *http.Request) {
		location, err := redis.String(do("GET", "redigo:"+r.PathValue("code")))
		if err != nil {
			http.NotFound(w, r)
			return
		}
		w.Header()["Location"] = []string{location}
		w.WriteHeader(http.StatusFound)
	})
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Args[1], nil))
}

func must[T any](v T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return v
}
