package main

import "net/http"

// Other sites' pages (CORS). What hop answers as JSON any page may read, since it gets no more than
// anybody: browsers send no password along with such requests. Whoever gives a page a token lets it
// do what the token lets it do; without one, writes from other sites are refused (ServeHTTP).

// What other sites' pages may read and send, made once.
var (
	anyOrigin    = []string{"*"}
	anyHeader    = []string{"*"}
	otherMethods = []string{"GET, HEAD, POST, PUT, PATCH, DELETE"}
	otherHeaders = []string{"Authorization, Content-Type, If-Match, If-None-Match, Idempotency-Key"}
	otherMaxAge  = []string{"7200"} // seconds until a browser asks again; Chromium takes no more
)

// shareAnswer lets pages of other sites read an answer and its headers.
func shareAnswer(h http.Header) {
	h["Access-Control-Allow-Origin"] = anyOrigin
	h["Access-Control-Expose-Headers"] = anyHeader
}

// isPreflight says whether a browser asks what a page of another site may send.
func isPreflight(r *http.Request) bool {
	return r.Method == http.MethodOptions && r.Header.Get("Origin") != "" &&
		r.Header.Get("Access-Control-Request-Method") != ""
}

// answerPreflight says what it may: everything, as far as the token goes that comes with it.
func answerPreflight(w http.ResponseWriter) {
	h := w.Header()
	h["Access-Control-Allow-Origin"] = anyOrigin
	h["Access-Control-Allow-Methods"] = otherMethods
	h["Access-Control-Allow-Headers"] = otherHeaders
	h["Access-Control-Max-Age"] = otherMaxAge
	w.WriteHeader(http.StatusNoContent)
}
